"""UNet2DConditionModel against diffusers, as pixel cascades and decoders of embeddings use it."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, compare_gradients, copy, image, nchw, randomise
from flax import nnx

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel

SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "resnet_time_scale_shift": "scale_shift",
}
TRANSFORMER = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "use_linear_projection": True,
}
IF = {
    **SIMPLE,
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 5,
    "cross_attention_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 10,
    "encoder_hid_dim_type": "text_proj",
    "out_channels": 6,
}
KANDINSKY = {
    **SIMPLE,
    "out_channels": 8,
    "addition_embed_type": "image",
    "encoder_hid_dim": 10,
    "encoder_hid_dim_type": "image_proj",
}
CONFIGS = {
    "if-1": {**IF, "in_channels": 3},
    "if-2": {
        **IF,
        "in_channels": 6,
        "class_embed_type": "timestep",
        "layers_per_block": (1, 2),
        "mid_block_scale_factor": 1.4142,
        "only_cross_attention": True,
        "resnet_out_scale_factor": 1.4142,
        "resnet_skip_time_act": True,
        "time_embedding_act_fn": "gelu",
    },
    "kandinsky-2.1": {
        **KANDINSKY,
        "addition_embed_type": "text_image",
        "encoder_hid_dim_type": "text_image_proj",
    },
    "kandinsky-2.2": KANDINSKY,
    "kandinsky-2.2-inpainting": {**KANDINSKY, "in_channels": 9},
    "kandinsky-2.2-hint": {**KANDINSKY, "in_channels": 8, "addition_embed_type": "image_hint"},
    "karlo": {**SIMPLE, "in_channels": 3, "out_channels": 6, "class_embed_type": "identity"},
    "stable-unclip": {
        **TRANSFORMER,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 14,
    },
    "x4-upscaler": {
        **TRANSFORMER,
        "in_channels": 7,
        "num_class_embeds": 20,
        "only_cross_attention": (False, True),
    },
    "concatenated-classes": {
        **TRANSFORMER,
        "class_embed_type": "timestep",
        "class_embeddings_concat": True,
        "learned_variance": False,
    },
    "only-cross-attention-in-the-middle": {
        **SIMPLE,
        "mid_block_only_cross_attention": True,
        "attention_head_dim": (2, 4),
        "encoder_hid_dim": 10,
    },
}
# Channels of the noisy image, and whether the network learns a variance.
NOISY = {
    "if-1": (3, True),
    "if-2": (3, True),
    "kandinsky-2.1": (4, True),
    "kandinsky-2.2": (4, True),
    "kandinsky-2.2-inpainting": (4, True),
    "kandinsky-2.2-hint": (4, True),
    "karlo": (3, True),
    "stable-unclip": (4, False),
    "x4-upscaler": (4, False),
    "concatenated-classes": (4, False),
    "only-cross-attention-in-the-middle": (4, False),
}
ADDED = ("text_embeds", "image_embeds", "hint")


def pair(name):
    fields = CONFIGS[name]
    theirs = {key: value for key, value in fields.items() if key != "learned_variance"}
    theirs = randomise(diffusers.UNet2DConditionModel(**theirs))
    config = from_mapping(UNet2DConditionConfig, fields, source=name)
    return theirs, copy(theirs, UNet2DConditionModel, config)


def inputs(ours, batch=2, size=(8, 4)):
    """Numpy arguments of our model by name, of the shapes that its adapter says."""
    network = UNetAdapter(ours, "epsilon")
    made = {"timesteps": np.linspace(0.5, 981, batch, dtype=np.float32)}
    for seed, (name, leaf) in enumerate(network.conditioning_shapes(size, 5).items()):
        made[name] = image((batch, *leaf.shape), seed=seed)
    if "class_labels" in made and made["class_labels"].ndim == 1:
        kind = np.int32 if ours.config.num_class_embeds else np.float32
        made["class_labels"] = np.array([3, 17] * batch, kind)[:batch]
    channels = [image((batch, *size, ours.config.channels[1]), seed=20)]
    if "channels" in made:
        channels.append(made.pop("channels"))
    return made | {"sample": np.concatenate(channels, axis=-1)}


def call_theirs(theirs, made):
    added = {
        name: nchw(made[name]) if name == "hint" else torch.from_numpy(made[name])
        for name in ADDED
        if name in made
    }
    rest = {
        theirs_name: torch.from_numpy(made[name])
        for name, theirs_name in (
            ("class_labels", "class_labels"),
            ("context_mask", "encoder_attention_mask"),
        )
        if name in made
    }
    return theirs(
        nchw(made["sample"]),
        torch.from_numpy(made["timesteps"]),
        encoder_hidden_states=torch.from_numpy(made["context"]) if "context" in made else None,
        added_cond_kwargs=added or None,
        **rest,
    ).sample


def call_ours(ours, made):
    return jax.jit(lambda made: ours(**made))({k: jnp.asarray(v) for k, v in made.items()})


@pytest.mark.parametrize("name", CONFIGS)
def test_output(name):
    theirs, ours = pair(name)
    made = inputs(ours)
    agree(call_ours(ours, made), call_theirs(theirs, made))


@pytest.mark.parametrize("name", CONFIGS)
def test_channels(name):
    config = from_mapping(UNet2DConditionConfig, CONFIGS[name], source=name)
    noisy, learned = NOISY[name]
    assert (config.channels[1], config.learns_variance) == (noisy, learned)
    hint = 4 if config.addition_embed_type == "image_hint" else 0
    assert noisy + hint + config.concatenated_channels == config.in_channels


def test_hidden_tokens():
    theirs, ours = pair("karlo")
    made = inputs(ours)
    plain = call_ours(ours, made)
    made["context_mask"] = np.array([[True] * 3 + [False] * 2, [True] * 5])
    out = call_ours(ours, made)
    agree(out, call_theirs(theirs, made))
    assert np.abs(out - plain)[0].max() > 1e-3
    np.testing.assert_allclose(out[1], plain[1], atol=1e-5)


@pytest.mark.parametrize("name", ["if-2", "kandinsky-2.1"])
def test_gradients(name):
    theirs, ours = pair(name)
    made = inputs(ours)
    # In float64, so that only our rounding counts.
    exact = {name: array.astype(np.float64) for name, array in made.items()}
    call_theirs(theirs.double(), exact).square().mean().backward()
    graph, state = nnx.split(ours)
    arguments = {k: jnp.asarray(v) for k, v in made.items()}

    def loss(state):
        return jnp.square(nnx.merge(graph, state)(**arguments)).mean()

    compare_gradients(nnx.merge(graph, jax.jit(jax.grad(loss))(state)), theirs)
