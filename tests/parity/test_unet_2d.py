"""UNet2DModel against diffusers: super-resolution of pixels, and UNets without text."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, copy, image, nchw, randomise

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.unet_2d import UNet2DModel
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
CONFIGS = {
    "super-resolution": {
        **SMALL,
        "in_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "add_attention": False,
        "resnet_time_scale_shift": "scale_shift",
        "mid_block_scale_factor": 1.5,
    },
    "unconditional": {
        **SMALL,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    },
    "classes": {
        **SMALL,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "attn_norm_num_groups": 2,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 20,
        "out_channels": 6,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_output(name):
    config = from_mapping(UNet2DConfig, CONFIGS[name], source=name)
    theirs = randomise(diffusers.UNet2DModel(**CONFIGS[name]))
    ours = copy(theirs, UNet2DModel, config)
    network = UNetAdapter(ours, "epsilon")
    cond = {
        key: image((2, *leaf.shape), seed=3)
        for key, leaf in network.conditioning_shapes((8, 4), 0).items()
    }
    assert config.channels[1] == 3
    assert network.learns_variance == (name == "classes")
    t, x = np.array([0.5, 981], np.float32), image((2, 8, 4, 3))
    sample, rest = x, {}
    if "channels" in cond:
        sample = np.concatenate([x, cond["channels"]], axis=-1)
    if "class_labels" in cond:
        cond["class_labels"] = np.array([3, 17], np.int32)
        rest["class_labels"] = torch.from_numpy(cond["class_labels"])
    out = jax.jit(lambda x, t, cond: ours_called(network, x, t, cond))(
        jnp.asarray(x), jnp.asarray(t), {key: jnp.asarray(value) for key, value in cond.items()}
    )
    agree(out, theirs(nchw(sample), torch.from_numpy(t), **rest).sample)


def ours_called(network, x, t, cond):
    """The network as its adapter calls it, with all of its output."""
    if "channels" in cond:
        x = jnp.concatenate([x, cond.pop("channels")], axis=-1)
    return network.module(x, t, **cond)
