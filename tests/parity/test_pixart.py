"""PixArtTransformer2DModel against diffusers, in several shapes."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, compare_gradients, copy, image, nchw, randomise
from flax import nnx

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.pixart.config import PixArtTransformer2DConfig
from jaxdiff.models.pixart.module import PixArtTransformer2DModel


def config(**fields):
    """A small config."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "num_layers": 2,
        "sample_size": 8,
        "caption_channels": 10,
        **fields,
    }


CONFIGS = {
    "learned-variance": config(),
    "plain": config(out_channels=None, interpolation_scale=2),
    "without-projection": config(
        caption_channels=None, cross_attention_dim=10, out_channels=4, attention_bias=False
    ),
    "large": config(num_layers=1, sample_size=128, use_additional_conditions=False),
}


def pair(name):
    theirs = randomise(diffusers.PixArtTransformer2DModel(**CONFIGS[name]))
    ours = from_mapping(PixArtTransformer2DConfig, CONFIGS[name], source=name)
    return theirs, copy(theirs, PixArtTransformer2DModel, ours)


def inputs(size):
    made = {
        "sample": image((3, *size, 4)),
        "timesteps": np.array([0, 500.5, 999], np.float32),
        "context": image((3, 5, 10), seed=2),
    }
    return {name: jnp.asarray(array) for name, array in made.items()}


def call_theirs(theirs, made, dtype=torch.float32):
    return theirs(
        nchw(np.asarray(made["sample"])).to(dtype),
        encoder_hidden_states=torch.from_numpy(np.array(made["context"])).to(dtype),
        timestep=torch.from_numpy(np.array(made["timesteps"])).to(dtype),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, (8, 8)) for name in CONFIGS), ("plain", (12, 8)), ("learned-variance", (4, 12))],
)
def test_output(name, size):
    theirs, ours = pair(name)
    made = inputs(size)
    agree(jax.jit(lambda made: ours(**made))(made), call_theirs(theirs, made))


def test_gradients():
    theirs, ours = pair("plain")
    made = inputs((8, 8))
    call_theirs(theirs.double(), made, torch.float64).square().mean().backward()
    graph, state = nnx.split(ours)

    def loss(state):
        return jnp.square(nnx.merge(graph, state)(**made)).mean()

    compare_gradients(nnx.merge(graph, jax.jit(jax.grad(loss))(state)), theirs)
