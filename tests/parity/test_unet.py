"""UNet2DConditionModel against diffusers, in the styles of the models that use it."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, compare_gradients, copy, image, nchw, randomise
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from flax import nnx

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.nn.embeddings import guidance_embedding

DOWN, CROSS_DOWN, ATTN_DOWN = "DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D"
UP, CROSS_UP, ATTN_UP = "UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"


def config(down, up, channels, **fields):
    """A small config of these blocks."""
    return {
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": channels,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        **fields,
    }


ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
}
UNCONDITIONAL = {"cross_attention_dim": None, "mid_block_type": "UNetMidBlock2D"}

CONFIGS = {
    "sd1": config((CROSS_DOWN,) * 3 + (DOWN,), (UP,) + (CROSS_UP,) * 3, (8, 16, 24, 24)),
    "sd2": config(
        (CROSS_DOWN, DOWN),
        (UP, CROSS_UP),
        (8, 16),
        attention_head_dim=(1, 4),
        use_linear_projection=True,
        upcast_attention=True,
        layers_per_block=2,
    ),
    "sdxl": config(
        (DOWN, CROSS_DOWN, CROSS_DOWN),
        (CROSS_UP, CROSS_UP, UP),
        (8, 16, 24),
        attention_head_dim=(1, 2, 3),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        upcast_attention=None,
        **ADDED,
    ),
    "refiner": config(
        (DOWN, CROSS_DOWN, DOWN),
        (UP, CROSS_UP, UP),
        (8, 16, 16),
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        **ADDED,
    ),
    "inpainting": config((CROSS_DOWN, DOWN), (UP, CROSS_UP), (8, 8), in_channels=9),
    "unconditional": config((DOWN, DOWN), (UP, UP), (8, 16), **UNCONDITIONAL),
    "no-mid": config((DOWN, DOWN), (UP, UP), (8, 16), mid_block_type=None),
    "self-attention": config(
        (DOWN, ATTN_DOWN),
        (ATTN_UP, UP),
        (8, 16),
        attention_head_dim=4,
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        **UNCONDITIONAL,
    ),
    "odd-options": config(
        (CROSS_DOWN, CROSS_DOWN),
        (CROSS_UP, UP),
        (8, 16),
        layers_per_block=(1, 2),
        transformer_layers_per_block=((1,), (2, 1)),
        reverse_transformer_layers_per_block=((2, 1, 3), (1, 2)),
        center_input_sample=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        mid_block_scale_factor=1.5,
        conv_in_kernel=5,
        conv_out_kernel=1,
        time_embedding_dim=20,
        act_fn="mish",
        norm_eps=1e-4,
        out_channels=6,
    ),
    "told-scale": config((CROSS_DOWN, DOWN), (UP, CROSS_UP), (8, 8), time_cond_proj_dim=10),
    "asymmetric-padding": config((DOWN, DOWN), (UP, UP), (8, 8), downsample_padding=0),
}


def pair(name):
    fields = CONFIGS[name]
    # diffusers takes null for the context's width only where it does not look at it.
    width = fields["cross_attention_dim"] or (None,) * len(fields["block_out_channels"])
    theirs = randomise(diffusers.UNet2DConditionModel(**{**fields, "cross_attention_dim": width}))
    config = from_mapping(UNet2DConditionConfig, fields, source=name)
    return theirs, copy(theirs, UNet2DConditionModel, config)


def inputs(config, batch, size):
    """Numpy arguments of our model by name."""
    made = {
        "sample": image((batch, *size, config.in_channels)),
        "timesteps": np.linspace(0.5, 981, batch, dtype=np.float32),
    }
    if config.has_context:
        made["context"] = image((batch, 5, 12), seed=2)
    if config.addition_embed_type:
        made["text_embeds"] = image((batch, 10), seed=3)
        made["time_ids"] = np.array([[64, 48, 0, 3, 512, 1024]] * batch, np.float32)
    if config.time_cond_proj_dim:
        made["timestep_cond"] = image((batch, config.time_cond_proj_dim), seed=4)
    return made


def call_theirs(theirs, made):
    added = {k: torch.from_numpy(made[k]) for k in ("text_embeds", "time_ids") if k in made}
    context = torch.from_numpy(made["context"]) if "context" in made else None
    return theirs(
        nchw(made["sample"]),
        torch.from_numpy(made["timesteps"]),
        encoder_hidden_states=context,
        added_cond_kwargs=added or None,
        timestep_cond=torch.from_numpy(made["timestep_cond"]) if "timestep_cond" in made else None,
    ).sample


@pytest.mark.parametrize("name", CONFIGS)
def test_output(name):
    theirs, ours = pair(name)
    made = inputs(ours.config, 2, (8, 16))
    out = jax.jit(lambda made: ours(**made))({k: jnp.asarray(v) for k, v in made.items()})
    agree(out, call_theirs(theirs, made))


@pytest.mark.parametrize("size", [(7, 9), (10, 13), (5, 4)])
def test_odd_resolution(size):
    theirs, ours = pair("sd1")
    made = inputs(ours.config, 1, size)
    out = jax.jit(lambda made: ours(**made))({k: jnp.asarray(v) for k, v in made.items()})
    agree(out, call_theirs(theirs, made))


def test_perturbed_attention():
    """diffusers' processors for it take the batch as halves, of which the second is perturbed."""
    theirs, ours = pair("sdxl")
    made = inputs(ours.config, 2, (8, 8))
    made = {name: np.repeat(array[:1], 2, axis=0) for name, array in made.items()}
    for block in theirs.mid_block.attentions[0].transformer_blocks:
        block.attn1.set_processor(PAGIdentitySelfAttnProcessor2_0())
    perturbed = jnp.array([False, True])
    out = jax.jit(lambda made: ours(**made, perturbed=perturbed))(
        {k: jnp.asarray(v) for k, v in made.items()}
    )
    agree(out, call_theirs(theirs, made))
    assert np.max(np.abs(out[1] - out[0])) > 1e-3


def test_embedded_guidance_scale():
    w = np.array([1.0, 3.5, 7.5, 15.0])
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    agree(guidance_embedding(jnp.asarray(w, jnp.float32), 10), embed(None, torch.tensor(w) - 1, 10))


def test_integer_timesteps():
    theirs, ours = pair("unconditional")
    made = inputs(ours.config, 2, (4, 4)) | {"timesteps": np.array([0, 999])}
    agree(ours(jnp.asarray(made["sample"]), jnp.array([0, 999])), call_theirs(theirs, made))


def test_gradients():
    theirs, ours = pair("sdxl")
    made = inputs(ours.config, 2, (8, 8))
    # In float64, so that only our rounding counts.
    exact = {name: array.astype(np.float64) for name, array in made.items()}
    call_theirs(theirs.double(), exact).square().mean().backward()
    graph, state = nnx.split(ours)
    arguments = {k: jnp.asarray(v) for k, v in made.items()}

    def loss(state):
        return jnp.square(nnx.merge(graph, state)(**arguments)).mean()

    compare_gradients(nnx.merge(graph, jax.jit(jax.grad(loss))(state)), theirs)
