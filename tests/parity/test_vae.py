"""AutoencoderKL and AutoencoderTiny against diffusers: outputs and gradients, in several shapes."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, compare_gradients, copy, image, nchw, randomise
from flax import nnx

from jaxdiff.core.configs import from_mapping
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.vq_model import VQModel, VQModelConfig


def config(*channels, **fields):
    """A small config with one block for each entry of `channels`."""
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "norm_num_groups": 4,
        **fields,
    }


CONFIGS = {
    "one-block": config(8),
    "sd": config(8, 16, 16, 16, layers_per_block=2),
    "no-quant": config(
        8,
        16,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ),
    "no-attention": config(8, 12, 16, mid_block_add_attention=False, act_fn="gelu"),
    "attention-in-stages": config(
        8,
        12,
        layers_per_block=2,
        down_block_types=("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    ),
    "grey": config(8, 16, in_channels=1, out_channels=1, use_quant_conv=False),
}


def pair(name):
    theirs = randomise(diffusers.AutoencoderKL(**CONFIGS[name]))
    ours = from_mapping(AutoencoderKLConfig, CONFIGS[name], source=name)
    return theirs, copy(theirs, AutoencoderKL, ours)


@pytest.mark.parametrize("name", CONFIGS)
def test_encode_and_decode(name):
    theirs, ours = pair(name)
    x = image((2, 16, 24, ours.config.in_channels))
    latents = theirs.encode(nchw(x)).latent_dist
    mean, logvar = jax.jit(lambda x: ours.encode(x))(jnp.asarray(x))
    agree(mean, latents.mean)
    agree(logvar, latents.logvar)
    z = image((2, 4, 6, ours.config.latent_channels), seed=2)
    decoded = jax.jit(lambda z: ours.decode(z))(jnp.asarray(z))
    agree(decoded, theirs.decode(nchw(z)).sample)


def test_gradients():
    theirs, ours = pair("sd")
    x = image((2, 16, 16, 3))
    # In float64, so that only our rounding counts.
    theirs, exact = theirs.double(), nchw(x).double()
    latents = theirs.encode(exact).latent_dist
    decoded = theirs.decode(latents.mean).sample
    ((decoded - exact).square().mean() + latents.logvar.square().mean()).backward()
    graph, state = nnx.split(ours)

    def loss(state):
        vae = nnx.merge(graph, state)
        mean, logvar = vae.encode(jnp.asarray(x))
        return jnp.square(vae.decode(mean) - x).mean() + jnp.square(logvar).mean()

    compare_gradients(nnx.merge(graph, jax.jit(jax.grad(loss))(state)), theirs)


def test_scaling_is_invertible():
    _, ours = pair("no-quant")
    z = jnp.asarray(image((1, 2, 2, 16)))
    np.testing.assert_allclose(ours.scale(z), (z - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(ours.unscale(ours.scale(z)), z, rtol=1e-5, atol=1e-6)
    assert torch.is_tensor(nchw(np.asarray(z)))


VQ = {
    "f4": config(8, 12, 16, layers_per_block=2, num_vq_embeddings=64, vq_embed_dim=3),
    "four-channels": config(8, 16, latent_channels=4, mid_block_add_attention=False),
}


@pytest.mark.parametrize("name", VQ)
def test_vector_quantised(name):
    """Also the codebook's vectors: the decoder gets one that is near, not the latent itself."""
    theirs = randomise(diffusers.VQModel(**VQ[name]))
    ours = copy(theirs, VQModel, from_mapping(VQModelConfig, VQ[name], source=name))
    x = image((2, 16, 24, 3))
    latents, logvar = jax.jit(lambda x: ours.encode(x))(jnp.asarray(x))
    assert logvar is None
    agree(latents, theirs.encode(nchw(x)).latents)
    z = image((2, 4, 6, ours.config.latent_channels), seed=2)
    decoded = theirs.decode(nchw(z)).sample
    agree(jax.jit(lambda z: ours.decode(z))(jnp.asarray(z)), decoded)
    raw = theirs.decode(nchw(z), force_not_quantize=True).sample
    assert (decoded - raw).abs().max() > 1e-2 * raw.abs().max()
    slope = jax.grad(lambda z: ours.quantize(z)[0, 0, 0, 1])(jnp.asarray(z))
    assert slope[0, 0, 0, 1] == slope.sum() == 1
    np.testing.assert_allclose(ours.unscale(ours.scale(jnp.asarray(z))), z, rtol=1e-5)


# The decoder's norms have 32 groups, whatever the config says.
MOVQ = {
    "f8": config(
        32,
        32,
        64,
        64,
        norm_num_groups=8,
        layers_per_block=2,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=64,
        norm_type="spatial",
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    ),
    "three-stages": config(
        64, 32, 32, norm_type="spatial", act_fn="gelu", mid_block_add_attention=False
    ),
}


@pytest.mark.parametrize("name", MOVQ)
def test_spatial_norms(name):
    """Kandinsky's MoVQ: its pipelines neither quantise nor scale the latents."""
    theirs = randomise(diffusers.VQModel(**MOVQ[name]))
    with torch.no_grad():
        theirs.quantize.embedding.weight.mul_(3)  # so that the nearest vectors are several
    ours = copy(theirs, VQModel, from_mapping(VQModelConfig, MOVQ[name], source=name))
    side = 2 * ours.config.downscale
    x = image((2, side, side + ours.config.downscale, 3))
    latents, logvar = jax.jit(lambda x: ours.encode(x))(jnp.asarray(x))
    assert logvar is None
    agree(latents, theirs.encode(nchw(x)).latents)
    z = jnp.asarray(image((2, 2, 3, ours.config.latent_channels), seed=2))
    np.testing.assert_array_equal(ours.unscale(ours.scale(z)), z)
    np.testing.assert_array_equal(ours.scale(z), z)
    decode = jax.jit(lambda z: ours.decode(z))
    raw = theirs.decode(nchw(np.asarray(z)), force_not_quantize=True).sample
    agree(decode(z), raw)
    quantised = theirs.decode(nchw(np.asarray(z))).sample
    assert (quantised - raw).abs().max() > 1e-2 * raw.abs().max()
    agree(decode(ours.quantize(z)), quantised)


TINY = {
    "taesd": {},
    "other": {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (12, 12, 12),
        "num_encoder_blocks": (1, 2, 0),
        "num_decoder_blocks": (2, 1, 2),
        "act_fn": "silu",
        "latent_channels": 16,
    },
}


@pytest.mark.parametrize("name", TINY)
def test_tiny(name):
    """The range of images, the limit of latents, and every layer."""
    theirs = randomise(diffusers.AutoencoderTiny(**TINY[name]))
    ours = from_mapping(AutoencoderTinyConfig, TINY[name], source=name)
    ours = copy(theirs, AutoencoderTiny, ours)
    x = image((2, 16, 24, 3))
    latents, logvar = jax.jit(lambda x: ours.encode(x))(jnp.asarray(x))
    assert logvar is None
    agree(latents, theirs.encode(nchw(x)).latents)
    z = 3 * image((2, 4, 6, ours.config.latent_channels), seed=2)
    agree(jax.jit(lambda z: ours.decode(z))(jnp.asarray(z)), theirs.decode(nchw(z)).sample)


def test_gradients_of_tiny():
    theirs = randomise(diffusers.AutoencoderTiny(**TINY["other"]))
    ours = copy(
        theirs, AutoencoderTiny, from_mapping(AutoencoderTinyConfig, TINY["other"], source="")
    )
    x = image((2, 16, 16, 3))
    theirs, exact = theirs.double(), nchw(x).double()
    (theirs.decode(theirs.encode(exact).latents).sample - exact).square().mean().backward()
    graph, state = nnx.split(ours)

    def loss(state):
        vae = nnx.merge(graph, state)
        return jnp.square(vae.decode(vae.encode(jnp.asarray(x))[0]) - x).mean()

    compare_gradients(nnx.merge(graph, jax.jit(jax.grad(loss))(state)), theirs)
