"""The VAE's boundary: sizes, scaling and what its config may say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import initialise
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig

SMALL = {
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 2,
    "latent_channels": 3,
}


def vae(dtype=jnp.float32, **fields):
    return initialise(AutoencoderKL, AutoencoderKLConfig(**SMALL | fields), seed=0, dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(dtype):
    module = vae(dtype)
    images = jax.ShapeDtypeStruct((2, 16, 24, 3), dtype)
    mean, logvar = jax.eval_shape(module.encode, images)
    assert mean.shape == logvar.shape == (2, 4, 6, 3)
    assert mean.dtype == logvar.dtype == jnp.float32
    decoded = jax.eval_shape(module.decode, mean)
    assert (decoded.shape, decoded.dtype) == (images.shape, jnp.float32)
    assert module.config.downscale == 4


def test_log_variance_is_limited():
    module = vae()
    for bias, limit in ((100.0, 20.0), (-100.0, -30.0)):
        module.quant_conv.bias[...] = jnp.full(6, bias)
        np.testing.assert_array_equal(module.encode(jnp.zeros((1, 4, 4, 3)))[1], limit)


def test_scale_and_shift():
    module = vae(scaling_factor=2.0, shift_factor=0.5)
    z = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(module.scale(z), 2 * z - 1)
    np.testing.assert_allclose(module.unscale(module.scale(z)), z)


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 10, 8, 3), "image height: got 10, expected a multiple of 4"),
        ("encode", (1, 8, 8, 4), r"images: got shape \(1, 8, 8, 4\)"),
        ("decode", (1, 2, 2, 4), r"latents: got shape \(1, 2, 2, 4\)"),
    ],
)
def test_inputs(method, shape, message):
    with pytest.raises(InputError, match=message):
        getattr(vae(), method)(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types: got 1 blocks"),
        ({"up_block_types": ("UpBlock2D",) * 3}, "up_block_types: got 'UpBlock2D'"),
        ({"act_fn": "selu"}, "act_fn: got 'selu'"),
        ({"scaling_factor": 0.0}, "scaling_factor: got 0.0"),
        ({"latents_mean": (0.0,)}, "latents_mean: got"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(InputError, match=message):
        AutoencoderKLConfig(**SMALL | fields)
