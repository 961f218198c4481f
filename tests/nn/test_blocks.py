"""Embeddings, activations, ResNet and transformer blocks: formulas and identities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.nn.activations import activation
from jaxdiff.nn.added_kv_attention import AddedKVAttention
from jaxdiff.nn.embeddings import sinusoidal
from jaxdiff.nn.layers import LayerFactory, _vector_product
from jaxdiff.nn.lora import LoRALinear
from jaxdiff.nn.resnet import Downsample, ResnetBlock, Upsample, resize_nearest
from jaxdiff.nn.transformer import Attention, SpatialTransformer

ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
}


def layers():
    return LayerFactory(rngs=nnx.Rngs(0))


def image(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-6, 6, 25)
    expected = [ACTIVATIONS[name](v) for v in x]
    np.testing.assert_allclose(activation(name)(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gelu_keeps_its_tail_in_half_precision(dtype):
    x = jnp.linspace(-3, 3, 25).astype(dtype)
    expected = [ACTIVATIONS["gelu"](float(v)) for v in x]
    got = activation("gelu")(x)
    assert got.dtype == dtype
    precision = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=4 * precision)


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_linear_layer_in_parts_is_the_layer(with_lora):
    """The halves of its outputs, and its inputs in parts: values and gradients."""
    layer = layers().linear(6, 10)
    layer.bias[...] = jnp.arange(10.0)
    if with_lora:
        layer = LoRALinear(layer, 2, 0.5)
        layer.lora_A.kernel, layer.lora_B.kernel = nnx.Param(image(6, 2)), nnx.Param(image(2, 10))
    x = image(2, 3, 6)

    def gradient(function):
        graph, state = nnx.split(layer)

        def loss(state, x):
            out = function(nnx.merge(graph, state), x)
            return (out**2).sum(), out

        return jax.grad(loss, (0, 1), has_aux=True)(state, x)

    whole = gradient(lambda layer, x: layer(x))
    halves = gradient(lambda layer, x: jnp.concatenate(layer.split_outputs(x), -1))
    parts = gradient(lambda layer, x: layer.of_parts(x[..., :1], x[..., 1:4], x[..., 4:]))
    for apart in (halves, parts):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, apart
        )


def test_a_product_for_tpus_with_a_vector_of_each_image():
    x, kernel = image(3, 4), image(4, 5)
    np.testing.assert_allclose(_vector_product(x, kernel), x @ kernel, rtol=1e-6)


def test_unknown_activation():
    with pytest.raises(InputError, match="activation: got 'sillu'"):
        activation("sillu")


@pytest.mark.parametrize("cos_first", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoidal(cos_first, shift):
    t = np.array([0.0, 0.5, 999.0])
    angles = t[:, None] * 10000.0 ** (-np.arange(4) / (4 - shift))
    halves = [np.cos(angles), np.sin(angles)]
    expected = np.concatenate(halves if cos_first else halves[::-1], axis=1)
    got = sinusoidal(jnp.asarray(t, jnp.float32), 8, cos_first=cos_first, freq_shift=shift)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_sinusoidal_of_odd_width_ends_in_zero():
    got = sinusoidal(jnp.array([3, 4]), 7)
    assert got.shape == (2, 7)
    assert (got[:, -1] == 0).all()


@pytest.mark.parametrize("size", [(6, 10), (5, 9), (7, 11), (3, 5), (4, 4)])
def test_nearest(size):
    x = image(1, 3, 5, 2)
    rows = [i * 3 // size[0] for i in range(size[0])]
    columns = [j * 5 // size[1] for j in range(size[1])]
    np.testing.assert_array_equal(resize_nearest(x, size), np.asarray(x)[:, rows][:, :, columns])


def test_change_of_resolution():
    x = image(1, 6, 7, 4)
    assert Upsample(4, layers=layers())(x).shape == (1, 12, 14, 4)
    assert Upsample(4, layers=layers())(x, (11, 13)).shape == (1, 11, 13, 4)
    assert Downsample(4, layers=layers(), padding=1)(x).shape == (1, 3, 4, 4)
    assert Downsample(4, layers=layers(), padding=0)(x).shape == (1, 3, 3, 4)


def test_residual_blocks_can_start_as_the_identity():
    x = image(2, 4, 4, 8)
    options = {"layers": layers(), "groups": 2, "eps": 1e-5, "act": "silu", "time_width": 6}
    block = ResnetBlock(8, 8, zero_init=True, **options)
    np.testing.assert_array_equal(jax.jit(lambda x, t: block(x, t))(x, image(2, 6)), x)
    transformer = SpatialTransformer(
        8, layers=layers(), heads=2, context_width=5, depth=2, groups=2, linear=True
    )
    np.testing.assert_array_equal(jax.jit(lambda x, c: transformer(x, c))(x, image(2, 3, 5)), x)


def test_residual_blocks_can_change_the_resolution():
    """One that starts as the identity gives each pixel four times, or the mean of each four."""
    x = image(1, 4, 6, 8)
    options = {"layers": layers(), "groups": 2, "eps": 1e-5, "act": "silu", "zero_init": True}
    up, down = (ResnetBlock(8, 8, resample=name, **options) for name in ("up", "down"))
    np.testing.assert_array_equal(up(x), np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))
    mean = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    np.testing.assert_allclose(down(x), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(down(up(x)), x, rtol=1e-5, atol=1e-6)


def test_a_time_embedding_may_have_seen_the_activation_function():
    x, time = image(1, 4, 4, 8), image(1, 6)
    options = {"layers": layers(), "groups": 2, "eps": 1e-5, "act": "silu", "time_width": 6}
    block = ResnetBlock(8, 8, **options)
    expected = block(x, time)
    block.time_act = False
    np.testing.assert_allclose(block(x, jax.nn.silu(time)), expected, rtol=1e-5, atol=1e-6)


def added_kv_attention(**options):
    attention = AddedKVAttention(
        8, layers=layers(), head_width=4, context_width=32, groups=2, **options
    )
    attention.to_out[0].kernel[...] = jnp.eye(8)
    return attention


def test_attention_to_equal_tokens_of_a_context_alone_adds_their_value():
    attention = added_kv_attention(only_cross_attention=True)
    x, token = image(1, 4, 4, 8), image(1, 1, 32)
    got = attention(x, jnp.repeat(token, 3, axis=1)) - x
    expected = jnp.broadcast_to(attention.add_v_proj(token)[:, :, None], x.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norms_context", [False, True])
def test_hidden_tokens_of_a_context_are_those_that_are_not_there(norms_context):
    """But for a norm of the context, which is over all of its tokens, as in diffusers."""
    attention = added_kv_attention(norms_context=norms_context)
    x, context = image(2, 4, 4, 8), image(2, 5, 32)
    mask = jnp.broadcast_to(jnp.arange(5) < 3, (2, 5))
    hidden, shorter = attention(x, context, mask), attention(x, context[:, :3])
    assert (np.abs(hidden - shorter).max() > 1e-4) == norms_context
    np.testing.assert_allclose(
        attention(x, context, jnp.ones((2, 5), bool)), attention(x, context), atol=1e-5
    )


def test_output_scale_divides_the_sum():
    x = image(1, 4, 4, 8)
    block = ResnetBlock(
        8, 8, layers=layers(), groups=2, eps=1e-5, act="silu", output_scale=4.0, zero_init=True
    )
    np.testing.assert_allclose(block(x), x / 4, rtol=1e-6)


def test_attention_over_equal_tokens_is_their_value():
    """With one and the same context token m times, the weights do not matter."""
    attention = Attention(6, layers=layers(), heads=3, context_width=4)
    token = image(1, 1, 4)
    expected = attention.to_out[0](attention.to_v(token))
    got = attention(image(1, 5, 6), jnp.repeat(token, 7, axis=1))
    np.testing.assert_allclose(got, jnp.repeat(expected, 5, axis=1), rtol=1e-4, atol=1e-6)


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="attention heads: got 5, expected a divisor of width 8"):
        Attention(8, layers=layers(), heads=5)
