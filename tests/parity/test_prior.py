"""PriorTransformer against diffusers."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, compare_gradients, copy, image, randomise
from flax import nnx

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.build import param_dict
from jaxdiff.models.latent_codec import ImageEmbeddings
from jaxdiff.models.prior.adapter import PriorAdapter
from jaxdiff.models.prior.config import PriorTransformerConfig
from jaxdiff.models.prior.module import PriorTransformer

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "num_layers": 2,
    "embedding_dim": 10,
    "num_embeddings": 7,
}
CONFIGS = {"published": SMALL, "options": SMALL | {"embedding_proj_dim": 8} | {"num_layers": 1}}


def pair(name):
    theirs = randomise(diffusers.PriorTransformer(**CONFIGS[name]))
    config = from_mapping(PriorTransformerConfig, CONFIGS[name], source=name)
    return theirs, copy(theirs, PriorTransformer, config)


def inputs(ours):
    shapes = PriorAdapter(ours, "sample").conditioning_shapes((), 7)
    made = {"sample": image((3, 10)), "timesteps": np.array([0.5, 300, 981], np.float32)}
    made["context"] = image((3, *shapes["context"].shape), seed=2)
    made["text_embeds"] = image((3, *shapes["text_embeds"].shape), seed=3)
    return made | {"context_mask": np.arange(7)[None] < np.array([[2], [7], [4]])}


def call_theirs(theirs, made):
    made = {name: torch.from_numpy(array) for name, array in made.items()}
    return theirs(
        made["sample"],
        made["timesteps"],
        proj_embedding=made["text_embeds"],
        encoder_hidden_states=made["context"],
        attention_mask=made["context_mask"],
    ).predicted_image_embedding


@pytest.mark.parametrize("name", CONFIGS)
def test_output(name):
    """Through the adapter, which takes latents of any rank."""
    theirs, ours = pair(name)
    made = inputs(ours)
    cond = {key: jnp.asarray(array) for key, array in made.items()}
    x, t = cond.pop("sample"), cond.pop("timesteps")
    network = PriorAdapter(ours, "sample")
    assert not network.learns_variance
    agree(jax.jit(network)(param_dict(ours), x, t, cond), call_theirs(theirs, made))


def test_statistics():
    theirs, ours = pair("published")
    x = image((3, 10), seed=6)
    codec = ImageEmbeddings(ours.clip_mean, ours.clip_std)
    found = codec.unscale(jnp.asarray(x))
    agree(found, theirs.post_process_latents(torch.from_numpy(x)))
    np.testing.assert_allclose(codec.scale(found), x, rtol=1e-3, atol=1e-4)


def test_gradients():
    theirs, ours = pair("published")
    made = inputs(ours)
    # In float64, so that only our rounding counts; statistics are not read.
    exact = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in made.items()}
    call_theirs(theirs.double(), exact).square().mean().backward()
    for statistic in (theirs.clip_mean, theirs.clip_std):
        assert statistic.grad is None
        statistic.grad = torch.zeros_like(statistic)
    graph, state = nnx.split(ours)
    arguments = {k: jnp.asarray(v) for k, v in made.items()}

    def loss(state):
        return jnp.square(nnx.merge(graph, state)(**arguments)).mean()

    compare_gradients(nnx.merge(graph, jax.jit(jax.grad(loss))(state)), theirs)
