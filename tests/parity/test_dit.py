"""DiTTransformer2DModel and DiTPipeline against diffusers, in several shapes."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, compare_gradients, copy, image, nchw, randomise
from flax import nnx

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.dit.module import DiTTransformer2DModel

CLASSES = 1000  # diffusers' pipeline has no other null label


def config(**fields):
    """A small config."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 5,
        **fields,
    }


CONFIGS = {
    "learned-variance": config(out_channels=8),
    "plain": config(in_channels=3),
    "patches-of-four": config(patch_size=4, sample_size=16, out_channels=8),
    "exact-gelu": config(activation_fn="gelu", attention_bias=False, norm_eps=1e-3),
    "geglu": config(activation_fn="geglu", patch_size=1, sample_size=4),
}


def pair(fields):
    theirs = randomise(diffusers.DiTTransformer2DModel(**fields))
    ours = from_mapping(DiTTransformer2DConfig, fields, source="test")
    return theirs, copy(theirs, DiTTransformer2DModel, ours)


def inputs(config, size):
    made = {
        "sample": image((3, *size, config.in_channels)),
        "timesteps": np.array([0, 500.5, 999], np.float32),
        "class_labels": np.array([0, config.num_embeds_ada_norm, 2], np.int32),
    }
    return {name: jnp.asarray(array) for name, array in made.items()}


def call_theirs(theirs, made):
    return theirs(
        nchw(np.asarray(made["sample"])),
        timestep=torch.from_numpy(np.array(made["timesteps"])),
        class_labels=torch.from_numpy(np.array(made["class_labels"])).long(),
    ).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_output(name):
    theirs, ours = pair(CONFIGS[name])
    made = inputs(ours.config, (ours.config.sample_size,) * 2)
    agree(jax.jit(lambda made: ours(**made))(made), call_theirs(theirs, made))


@pytest.mark.parametrize("side", [4, 12])
def test_other_sizes_interpolate_positions(side):
    theirs, ours = pair(CONFIGS["learned-variance"])
    made = inputs(ours.config, (side, side))
    agree(jax.jit(lambda made: ours(**made))(made), call_theirs(theirs, made))


def test_gradients():
    theirs, ours = pair(CONFIGS["plain"])
    made = inputs(ours.config, (8, 8))
    # In float64, so that only our rounding counts.
    theirs = theirs.double()
    theirs(
        nchw(np.asarray(made["sample"])).double(),
        timestep=torch.from_numpy(np.array(made["timesteps"])).double(),
        class_labels=torch.from_numpy(np.array(made["class_labels"])).long(),
    ).sample.square().mean().backward()
    graph, state = nnx.split(ours)

    def loss(state):
        return jnp.square(nnx.merge(graph, state)(**made)).mean()

    compare_gradients(nnx.merge(graph, jax.jit(jax.grad(loss))(state)), theirs)
