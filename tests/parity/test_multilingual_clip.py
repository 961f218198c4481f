"""MultilingualCLIP, Kandinsky 2.1's text encoder, against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, copy, randomise
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP as TheirModel

from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.checkpoints.configs import from_transformers
from jaxdiff.core.errors import InputError
from jaxdiff.models.multilingual_clip.config import MultilingualCLIPConfig
from jaxdiff.models.multilingual_clip.module import MultilingualCLIP

FIELDS = {
    "vocab_size": 30,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 10,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "transformerDimSize": 24,
    "imageDimSize": 14,
}
# The longest text, and two with padding, 1.
IDS = np.array([[0, 9, 29, 7, 8, 3, 4, 2], [0, 5, 6, 2, 1, 1, 1, 1], [0, 2, 1, 1, 1, 1, 1, 1]])
MASK = IDS != 1


@pytest.fixture(scope="module")
def theirs():
    made = randomise(TheirModel(MCLIPConfig(**FIELDS)))
    with torch.no_grad():
        # so that positions count
        made.transformer.embeddings.position_embeddings.weight.mul_(2)
    return made


def output(theirs, hidden_states=False):
    ids, mask = torch.from_numpy(IDS), torch.from_numpy(MASK)
    if hidden_states:
        return theirs.transformer(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return theirs(ids, mask.long())


def test_states_and_pooled_embedding(theirs):
    config = from_transformers(
        MultilingualCLIPConfig, theirs.config.to_dict(), source="text_encoder"
    )
    ours = copy(theirs, MultilingualCLIP, config)
    pooled, states = output(theirs)
    ids = jnp.asarray(IDS, jnp.int32)
    features = jax.jit(lambda ids: ours.features(ids))(ids)
    agree(features.last, states)
    agree(features.pooled, pooled)
    np.testing.assert_array_equal(features.mask, MASK)
    agree(ours(ids), states)
    skipped = ours.features(ids, 1)
    agree(skipped.last, output(theirs, hidden_states=True)[-2])
    agree(skipped.pooled, pooled)
    with pytest.raises(InputError, match="ids: got 9 tokens, expected at most 8"):
        ours(jnp.zeros((1, 9), jnp.int32))


def test_folders_go_both_ways(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "a")
    component = read_component(tmp_path / "a")
    assert isinstance(component.module, MultilingualCLIP)
    pooled, states = output(theirs)
    features = component.module.features(jnp.asarray(IDS, jnp.int32))
    agree(features.last, states)
    agree(features.pooled, pooled)
    write_component(tmp_path / "b", component)
    again, report = TheirModel.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(output(again.eval())[0], pooled)
