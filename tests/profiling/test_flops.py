"""Model FLOPs against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.presets import preset
from jaxdiff.nn import attention as module
from jaxdiff.nn.attention import attention
from jaxdiff.nn.head_norm import HeadNorm
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import modulated_norm
from jaxdiff.nn.rotary import rotation
from jaxdiff.profiling.flops import forward_flops, gradient_flops

S = jax.ShapeDtypeStruct


def test_what_a_platform_computes_besides_does_not_count(monkeypatch):
    """Kernels of norms have no products of the model, nor do rows that a TPU has twice."""
    monkeypatch.setattr("jaxdiff.nn.platforms.has_tpu_compiler", lambda: True)
    layers = LayerFactory(rngs=None)
    norm, linear = HeadNorm(16, layers=layers, eps=1e-6), layers.linear(16, 32)
    by = rotation(jnp.arange(512)[:, None], (16,))
    heads, vectors = S((2, 512, 3, 16), jnp.float32), S((2, 16), jnp.float32)

    def normed(params, x):
        return with_params(norm, params)(x, by)

    def modulated(vector, x):
        return modulated_norm(x, vector, vector)

    def product(params, x):
        return with_params(linear, params)(x)

    tokens = S((2, 512, 16), jnp.float32)
    for count, factor in ((forward_flops, 1), (gradient_flops, 2)):
        assert count(normed, param_dict(norm), heads) == 0
        assert count(modulated, vectors, tokens) == 0
        assert count(product, param_dict(linear), vectors) == factor * 2 * 2 * 16 * 32


def test_of_branches_the_dearest_counts():
    a = S((3, 3), jnp.float32)

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, jnp.sin, x)

    assert forward_flops(either, a) == 2 * 3 * 3 * 3


def test_a_product_costs_once_more_for_each_side_that_is_trained():
    a, b = S((3, 5), jnp.float32), S((5, 7), jnp.float32)
    once = 2 * 3 * 5 * 7
    assert forward_flops(jnp.dot, a, b) == once
    assert gradient_flops(jnp.dot, a, b) == 2 * once
    assert gradient_flops(lambda w, x: jnp.dot(jnp.tanh(w), w.T), a, b) == 3 * 2 * 3 * 5 * 3


def test_what_is_not_trained_or_cut_off_has_no_gradient():
    w, x = S((4, 4), jnp.float32), S((2, 4), jnp.float32)
    once = 2 * 2 * 4 * 4

    def two_layers(w, x):
        return x @ w @ w

    # d w of both, d x of the second only: the input is given.
    assert gradient_flops(two_layers, w, x) == 5 * once
    assert gradient_flops(lambda w, x: x @ jax.lax.stop_gradient(w) @ w, w, x) == 3 * once


def test_convolution():
    def convolve(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    kernel, x = S((3, 3, 4, 6), jnp.float32), S((2, 8, 8, 4), jnp.float32)
    once = 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)
    assert forward_flops(convolve, kernel, x) == once
    assert gradient_flops(convolve, kernel, x) == 2 * once


@pytest.mark.parametrize("tokens", [16, 2048])
def test_attention_counts_as_its_equation_says_whatever_computes_it(tokens):
    q, k = S((2, tokens, 3, 8), jnp.float32), S((2, 77, 3, 8), jnp.float32)
    once = 2 * 2 * 3 * tokens * 77 * 8
    assert forward_flops(attention, q, k, k) == 2 * once
    # scores: for q; their product with v: for the weights
    assert gradient_flops(attention, q, k, k) == 4 * once


def test_attention_is_found_by_the_name_of_its_function():
    assert module._run.__name__ == module.ATTENTION_JIT_NAME  # pyright: ignore


def test_nothing_computed_again_counts_and_loops_count_their_rounds():
    w = S((4, 4), jnp.float32)
    once = 2 * 4 * 4 * 4

    def looped(w):
        return jax.lax.scan(lambda x, _: (x @ w, None), w, None, length=3)[0]

    assert forward_flops(looped, w) == 3 * once
    again = jax.checkpoint(looped)
    assert gradient_flops(again, w) == gradient_flops(looped, w) == 9 * once


def test_stable_diffusion_15_at_512_pixels():
    """Its convolutions, products and attention, by hand 0.80 TFLOPs for one picture."""
    unet = preset("unet", "sd15").abstract(dtype=jnp.bfloat16)

    def network(params, x, t, context):
        return with_params(unet, params)(x, t, context)

    shapes = S((1, 64, 64, 4), jnp.float32), S((1,), jnp.int32), S((1, 77, 768), jnp.bfloat16)
    forward = forward_flops(network, param_dict(unet), *shapes)
    assert forward == pytest.approx(_by_hand(), rel=2e-3)


def _by_hand() -> float:
    """2 x multiplications, walking the network's diagram; embeddings of the time left out."""
    total = 0.0

    def conv(side, n_in, n_out, size):
        nonlocal total
        total += 2 * side**2 * n_in * n_out * size**2

    def resnet(side, n_in, n_out):
        conv(side, n_in, n_out, 3)
        conv(side, n_out, n_out, 3)
        if n_in != n_out:
            conv(side, n_in, n_out, 1)

    def transformer(side, c):
        nonlocal total
        n = side**2
        total += 2 * n * c * c * (2 + 4 + 2)  # in, out; q k v out; q and out of the second
        total += 2 * 77 * 768 * c * 2  # its k and v
        total += 2 * 2 * n * n * c + 2 * 2 * n * 77 * c  # scores and sums
        total += 2 * n * c * (8 * c + 4 * c)  # the gated perceptron

    conv(64, 4, 320, 3)
    widths, skips, c = (320, 640, 1280, 1280), [320], 320
    for block, width in enumerate(widths):
        side = 64 // 2**block
        for _ in range(2):
            resnet(side, c, width)
            if block < 3:
                transformer(side, width)
            c = width
            skips.append(c)
        if block < 3:
            conv(side // 2, c, c, 3)
            skips.append(c)
    resnet(8, 1280, 1280)
    transformer(8, 1280)
    resnet(8, 1280, 1280)
    for block, width in reversed(list(enumerate(widths))):
        side = 64 // 2**block
        for _ in range(3):
            resnet(side, c + skips.pop(), width)
            if block < 3:
                transformer(side, width)
            c = width
        if block:
            conv(side * 2, c, c, 3)
    conv(64, 320, 4, 3)
    return total
