"""Layers against their definitions in float64, and the dtypes they work in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.nn.initializers import ONES, Constant, Normal, lecun_normal
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.norms import group_norm, layer_norm

HALF = {"dtype": jnp.bfloat16}


def make(**options):
    return LayerFactory(rngs=nnx.Rngs(0), **options)


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_linear():
    layer, x = make().linear(3, 5), values(2, 4, 3)
    layer.bias[...] = jnp.arange(5.0)
    np.testing.assert_allclose(
        layer(jnp.asarray(x)), x @ np.asarray(layer.kernel[...]) + np.arange(5), rtol=1e-5
    )


@pytest.mark.parametrize(("stride", "padding"), [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
def test_conv(stride, padding):
    layer, x = make().conv(2, 3, 3, stride=stride, padding=padding), values(1, 6, 8, 2)
    kernel, padded = np.asarray(layer.kernel[...]), np.pad(x, ((0, 0), *padding, (0, 0)))
    got = np.asarray(layer(jnp.asarray(x)))
    for i, j in np.ndindex(got.shape[1:3]):
        window = padded[0, stride * i :, stride * j :][:3, :3]
        np.testing.assert_allclose(got[0, i, j], np.tensordot(window, kernel, 3), rtol=1e-4)


def test_embed_takes_the_nearest_row_outside_its_table():
    table = make().embed(4, 3)
    rows = np.asarray(table.embedding[...])
    np.testing.assert_array_equal(table(jnp.array([[1, 3, 9]])), rows[[[1, 3, 3]]])


def normalised(x, axes, eps):
    x = x.astype(np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def test_layer_norm():
    norm, x = make().layer_norm(6, eps=1e-3), values(2, 3, 6)
    norm.scale[...], norm.bias[...] = jnp.full(6, 2.0), jnp.full(6, 3.0)
    np.testing.assert_allclose(
        norm(jnp.asarray(x)), 2 * normalised(x, -1, 1e-3) + 3, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (2, 7, 8)])
def test_group_norm(shape):
    norm, x = make().group_norm(8, groups=4, eps=1e-3), values(*shape)
    grouped = normalised(x.reshape(2, -1, 4, 2), (1, 3), 1e-3).reshape(shape)
    np.testing.assert_allclose(norm(jnp.asarray(x)), grouped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["layer_norm", "group_norm"])
def test_norms_keep_their_precision_far_from_zero(name):
    """A mean 1000 times the deviation: the mean of squares would lose half of the digits."""
    options = {"eps": 0.0} | ({"groups": 1} if name == "group_norm" else {})
    x = 1000 + values(1, 64, 64)
    axes = -1 if name == "layer_norm" else (1, 2)
    got = getattr(make(), name)(64, **options)(jnp.asarray(x))
    np.testing.assert_allclose(got, normalised(x, axes, 0), atol=2e-3)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("offset", [0, 100])
def test_gradients_of_norms(groups, offset):
    """Of a layer norm and a group norm: those of the definition, differentiated in float64."""
    x, scale, bias = offset + values(3, 20, 6), values(6, seed=1), values(6, seed=2)
    direction = values(*x.shape, seed=3)

    def defined(x, scale, bias):
        grouped = x.reshape((3, 20, 1 if groups is None else groups, -1))
        axes = 3 if groups is None else (1, 3)
        centred = grouped - grouped.mean(axes, keepdims=True)
        variance = jnp.square(centred).mean(axes, keepdims=True)
        normed = (centred / jnp.sqrt(variance + 1e-2)).reshape(x.shape)
        return (direction * (normed * scale.reshape(1, 1, 6) + bias.reshape(1, 1, 6))).sum()

    def made(x, scale, bias):
        if groups is not None:
            return (direction * group_norm(x, scale, bias, groups, 1e-2)).sum()
        return (direction * layer_norm(x, scale, bias, 1e-2)).sum()

    got = jax.grad(made, (0, 1, 2))(*map(jnp.asarray, (x, scale, bias)))
    with jax.enable_x64(True):
        direction = direction.astype(np.float64)
        exact = (jnp.asarray(a, jnp.float64) for a in (x, scale, bias))
        wanted = jax.grad(defined, (0, 1, 2))(*exact)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_half_precision_norm_takes_float32_statistics():
    x = jnp.asarray(300 + values(1, 4096, 8), jnp.bfloat16)
    got = make(**HALF).group_norm(8, groups=2, eps=1e-5)(x)
    assert got.dtype == jnp.bfloat16
    expected = normalised(np.asarray(x, np.float32).reshape(1, 4096, 2, 4), (1, 3), 1e-5)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), expected.reshape(x.shape), rtol=1e-2, atol=1e-2
    )


def test_computes_in_dtype_and_stores_in_param_dtype():
    layers = make(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    x = jnp.ones((1, 4, 4, 8))
    made = (
        layers.linear(8, 8),
        layers.conv(8, 8, 3),
        layers.layer_norm(8),
        layers.group_norm(8, groups=2, eps=1e-5),
    )
    for layer in made:
        assert layer(x).dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {
            jnp.dtype(jnp.float16)
        }


def test_groups_must_divide_the_channels():
    with pytest.raises(InputError, match="norm_num_groups: got 32, expected a divisor of 48"):
        make().group_norm(48, groups=32, eps=1e-5)


def test_without_a_generator_weights_are_shapes():
    layer = LayerFactory(rngs=None, param_dtype=jnp.float16).conv(3, 4, 5)
    assert layer.kernel.get_value() == jax.ShapeDtypeStruct((5, 5, 3, 4), jnp.float16)


def test_initial_values():
    rng = np.random.default_rng(0)
    wide = lecun_normal((3, 3, 64, 128))
    assert wide == Normal((3 * 3 * 64) ** -0.5)
    drawn = wide.numpy(rng, (3, 3, 64, 128)), wide(jax.random.key(0), (9, 64, 128), jnp.float32)
    for array in drawn:
        np.testing.assert_allclose(array.std(), wide.std, rtol=0.01)
        np.testing.assert_allclose(array.mean(), 0, atol=1e-3)
    assert (ONES.numpy(rng, (3,)) == 1).all()
    assert (Constant(2.5)(jax.random.key(0), (2,), jnp.float32) == 2.5).all()
