"""LDM's text encoder against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, copy, randomise
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig as TheirConfig,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertModel as TheirModel,
)

from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.checkpoints.configs import from_transformers
from jaxdiff.core.errors import InputError
from jaxdiff.models.ldm_bert.config import LDMBertConfig
from jaxdiff.models.ldm_bert.module import LDMBertModel

FIELDS = {
    "vocab_size": 30,
    "max_position_embeddings": 7,
    "encoder_layers": 3,
    "encoder_ffn_dim": 20,
    "encoder_attention_heads": 2,
    "head_dim": 5,  # not d_model / heads
    "d_model": 16,
}
IDS = np.array([[2, 9, 29, 7, 3, 0, 0], [2, 5, 6, 7, 8, 9, 3]])


@pytest.fixture(scope="module")
def theirs():
    return randomise(TheirModel(TheirConfig(**FIELDS)))


def test_states(theirs):
    config = from_transformers(LDMBertConfig, theirs.config.to_dict(), source="bert")
    ours = copy(theirs, LDMBertModel, config)
    out = theirs(torch.from_numpy(IDS), output_hidden_states=True)
    ids = jnp.asarray(IDS, jnp.int32)
    agree(jax.jit(lambda ids: ours.features(ids).last)(ids), out.last_hidden_state)
    agree(ours(ids[:, :4]), theirs(torch.from_numpy(IDS[:, :4])).last_hidden_state)
    skipped = theirs.model.layer_norm(out.hidden_states[-2])
    agree(ours.features(ids, 1).last, skipped)
    with pytest.raises(InputError, match="ids: got 8 tokens, expected at most 7"):
        ours(jnp.zeros((1, 8), jnp.int32))


def test_folders_go_both_ways(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "a")
    component = read_component(tmp_path / "a")
    assert isinstance(component.module, LDMBertModel)
    expected = theirs(torch.from_numpy(IDS)).last_hidden_state
    agree(component.module(jnp.asarray(IDS, jnp.int32)), expected)
    write_component(tmp_path / "b", component)
    again = TheirModel.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(again(torch.from_numpy(IDS)).last_hidden_state, expected)
