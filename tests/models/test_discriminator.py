"""The discriminator of patches, layer by layer from the definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig

CONFIG = PatchDiscriminatorConfig(width=4, layers=2, norm_num_groups=2)
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (3, 16, 20, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    """Weights at which nothing is nearly zero, biases and norms included."""
    return {
        path: jnp.asarray(0.3 * RNG.normal(size=leaf.shape) + path.endswith("scale"), jnp.float32)
        for path, leaf in param_dict(abstract(PatchDiscriminator, CONFIG)).items()
    }


def logits(params, images, **options):
    return with_params(abstract(PatchDiscriminator, CONFIG, **options), params)(jnp.asarray(images))


def convolved(x, kernel, stride):
    """Each output from its own 4 x 4 window of the picture with a frame of zeros."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (4, 4), (1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel)


def normed(x, scale, bias):
    groups = x.reshape(*x.shape[:3], 2, -1)
    centred = groups - groups.mean((1, 2, 4), keepdims=True)
    deviation = np.sqrt((centred**2).mean((1, 2, 4), keepdims=True))
    return (centred / deviation).reshape(x.shape) * scale + bias


def rectified(x):
    return np.where(x > 0, x, 0.2 * x)


def test_logits_are_those_of_the_layers_by_hand(params):
    p = {path: np.asarray(array, np.float64) for path, array in params.items()}
    x = convolved(IMAGES.astype(np.float64), p["conv_in.kernel"], 2) + p["conv_in.bias"]
    x = rectified(x)
    for i, stride in enumerate((2, 1)):
        x = convolved(x, p[f"convs.{i}.kernel"], stride)
        x = rectified(normed(x, p[f"norms.{i}.scale"], p[f"norms.{i}.bias"]))
    expected = (convolved(x, p["conv_out.kernel"], 1) + p["conv_out.bias"])[..., 0]
    found = logits(params, IMAGES)
    assert found.shape == (3, 2, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_published_size():
    """The kernels of the discriminator that VQGAN and latent diffusion train."""
    table = param_dict(abstract(PatchDiscriminator, PatchDiscriminatorConfig()))
    kernels = {path: leaf.shape for path, leaf in table.items() if path.endswith("kernel")}
    assert kernels == {
        "conv_in.kernel": (4, 4, 3, 64),
        "convs.0.kernel": (4, 4, 64, 128),
        "convs.1.kernel": (4, 4, 128, 256),
        "convs.2.kernel": (4, 4, 256, 512),
        "conv_out.kernel": (4, 4, 512, 1),
    }


def test_an_image_has_its_own_logits(params):
    together = logits(params, IMAGES)
    for i in range(3):
        np.testing.assert_allclose(logits(params, IMAGES[i : i + 1])[0], together[i], rtol=1e-5)


def test_bfloat16_is_near_and_gives_float32(params):
    half, exact = logits(params, IMAGES, dtype=jnp.bfloat16), logits(params, IMAGES)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(half - exact).max()) < 0.05 * float(jnp.abs(exact).max())


def test_refusals():
    small = jax.ShapeDtypeStruct((1, 16, 11, 3), jnp.float32)
    module = abstract(PatchDiscriminator, CONFIG)
    with pytest.raises(InputError, match="got images of 16 x 11, expected sides from 12 on"):
        jax.eval_shape(lambda table, x: with_params(module, table)(x), param_dict(module), small)
    for name in ("width", "layers", "norm_num_groups"):
        with pytest.raises(InputError, match=rf"discriminator\.{name}: got 0"):
            dataclasses.replace(CONFIG, **{name: 0})
    with pytest.raises(InputError, match="norm_num_groups: got 3, expected a divisor of 8"):
        abstract(PatchDiscriminator, dataclasses.replace(CONFIG, norm_num_groups=3))
