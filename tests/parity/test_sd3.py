"""SD3Transformer2DModel against diffusers: Stable Diffusion 3, 3.5 medium and 3.5 large."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, compare_gradients, copy, image, nchw, randomise
from flax import nnx

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.build import initial_weights, param_dict
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.models.sd3.module import SD3Transformer2DModel

COMMON = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 4,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "caption_projection_dim": 12,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 8,
}
CONFIGS = {
    "sd3-medium": COMMON,
    "sd35-medium": {**COMMON, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "sd35-large": {**COMMON, "qk_norm": "rms_norm"},
    "dual-last": {**COMMON, "dual_attention_layers": (2,)},
    "deep": {**COMMON, "qk_norm": "rms_norm", "num_layers": 11},
    "others": {**COMMON, "patch_size": 1, "out_channels": None, "num_layers": 1},
}


def pair(name):
    theirs = randomise(diffusers.SD3Transformer2DModel(**CONFIGS[name]))
    with torch.no_grad():  # a checkpoint has its own positions, whatever they are
        positions = theirs.pos_embed.pos_embed
        positions += 0.1 * torch.from_numpy(image(tuple(positions.shape), seed=4))
    config = from_mapping(SD3Transformer2DConfig, CONFIGS[name], source=name)
    return theirs, copy(theirs, SD3Transformer2DModel, config)


def inputs(config, batch, size):
    """Numpy arguments of our model by name."""
    return {
        "sample": image((batch, *size, config.in_channels)),
        "timesteps": np.linspace(0.5, 1000, batch, dtype=np.float32),
        "context": image((batch, 5, config.joint_attention_dim), seed=2),
        "pooled_projections": image((batch, config.pooled_projection_dim), seed=3),
    }


def call_theirs(theirs, made, **options):
    return theirs(
        nchw(made["sample"]),
        encoder_hidden_states=torch.from_numpy(made["context"]),
        pooled_projections=torch.from_numpy(made["pooled_projections"]),
        timestep=torch.from_numpy(made["timesteps"]),
        **options,
    ).sample


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (4, 6), (6, 2)])
def test_output(name, size):
    theirs, ours = pair(name)
    made = inputs(ours.config, 2, size)
    out = jax.jit(lambda made: ours(**made))({k: jnp.asarray(v) for k, v in made.items()})
    agree(out, call_theirs(theirs, made))


@pytest.mark.parametrize("size", [(16, 16), (14, 4)])
def test_larger_than_trained(size):
    theirs, ours = pair("sd35-medium")
    made = inputs(ours.config, 1, size)
    out = jax.jit(lambda made: ours(**made))({k: jnp.asarray(v) for k, v in made.items()})
    agree(out, call_theirs(theirs, made))


def test_skipped_blocks():
    theirs, ours = pair("deep")
    made = inputs(ours.config, 1, (8, 8))
    made = {name: np.repeat(array, 2, axis=0) for name, array in made.items()}
    perturbed = jnp.array([False, True])
    out = jax.jit(lambda made: ours(**made, perturbed=perturbed))(
        {k: jnp.asarray(v) for k, v in made.items()}
    )
    agree(out[:1], call_theirs(theirs, made)[:1])
    agree(out[1:], call_theirs(theirs, made, skip_layers=[7, 8, 9])[1:])
    assert np.max(np.abs(out[1] - out[0])) > 1e-3


@pytest.mark.parametrize("max_size", [8, 12])
def test_initial_positions(max_size):
    fields = {**COMMON, "pos_embed_max_size": max_size}
    theirs = diffusers.SD3Transformer2DModel(**fields)
    ours = SD3Transformer2DModel(from_mapping(SD3Transformer2DConfig, fields, source=""), rngs=None)
    made = dict(initial_weights(ours, 0, only=lambda path: path == "pos_embed.pos_embed"))
    agree(made["pos_embed.pos_embed"], theirs.pos_embed.pos_embed)


def test_gradients():
    theirs, ours = pair("sd35-medium")
    made = inputs(ours.config, 2, (8, 8))
    # In float64, so that only our rounding counts.
    exact = {name: array.astype(np.float64) for name, array in made.items()}
    call_theirs(theirs.double(), exact).square().mean().backward()
    graph, state = nnx.split(ours)
    arguments = {k: jnp.asarray(v) for k, v in made.items()}

    def loss(state):
        return jnp.square(nnx.merge(graph, state)(**arguments)).mean()

    gradients = nnx.merge(graph, jax.jit(jax.grad(loss))(state))
    compare_gradients(gradients, theirs)
    assert not np.any(param_dict(gradients)["pos_embed.pos_embed"])
