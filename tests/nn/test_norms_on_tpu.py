"""The kernels of norms that TPUs run, interpreted on this machine, against the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.nn import head_norm_tpu, modulation, modulation_tpu
from jaxdiff.nn.head_norm import HeadNorm
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.modulation import modulated_norm
from jaxdiff.nn.modulation_tpu import ROWS, block_rows
from jaxdiff.nn.rotary import rotation

EPS = 1e-3


def values(*shape, seed=0, dtype=jnp.float32):
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(numbers, dtype)


def turned(n, width):
    """A rotation by positions on two axes."""
    ids = jnp.stack([jnp.arange(n), 3 * jnp.arange(n) % 7], axis=1)
    return rotation(ids, (width // 4, 3 * width // 4))


def head_norm_by_hand(x, scale, by):
    """The equations in float64: the norm, then a plane's rotation of each pair of channels."""
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale
    if by is None:
        return y
    cos, sin = (np.asarray(table, np.float64)[None, :, None, ::2] for table in by)
    even, odd = y[..., ::2], y[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(y.shape)


def modulated_by_hand(x, shift, scale):
    x, shift, scale = (np.asarray(each, np.float64) for each in (x, shift, scale))
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


def head_norm(scale, dtype=jnp.float32):
    norm = HeadNorm(len(scale), layers=LayerFactory(rngs=None, dtype=dtype), eps=EPS)
    norm.scale = nnx.Param(scale)
    return norm


def with_gradients(function, direction):
    """A function's value and the gradients of its product with `direction`."""

    def loss(*arrays):
        out = function(*arrays)
        return (out.astype(jnp.float32) * direction).sum(), out

    def call(*arrays):
        grad = jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)
        gradients, out = jax.jit(grad)(*arrays)
        return [out, *gradients]

    return call


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("n", [100, 256, 640])
def test_head_norm(n, rotated):
    x, scale, direction = values(2, n, 3, 16), values(16, seed=1), values(2, n, 3, 16, seed=2)
    by = turned(n, 16) if rotated else None

    def plain(x, scale):
        return head_norm(scale)(x, by)

    def kernel(x, scale):
        return head_norm_tpu.tpu(x, scale, by, eps=EPS, dtype=jnp.float32, interpret=True)

    expected = with_gradients(plain, direction)(x, scale)
    got = with_gradients(kernel, direction)(x, scale)
    for values_ in (got, expected):
        np.testing.assert_allclose(values_[0], head_norm_by_hand(x, scale, by), atol=2e-6)
    for a, b in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "width"), [(256, 64), (300, 48)])
def test_modulated_norm(n, width):
    x, direction = values(2, n, width), values(2, n, width, seed=3)
    shift, scale = values(2, width, seed=1), values(2, width, seed=2)
    kernel = functools.partial(modulation_tpu.tpu, eps=EPS, interpret=True)
    plain = functools.partial(modulated_norm, eps=EPS)
    got = with_gradients(kernel, direction)(x, shift, scale)
    expected = with_gradients(plain, direction)(x, shift, scale)
    for values_ in (got, expected):
        np.testing.assert_allclose(values_[0], modulated_by_hand(x, shift, scale), atol=1e-5)
    for a, b in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_several_blocks_of_tokens_add_to_the_gradients(monkeypatch):
    monkeypatch.setattr(modulation_tpu, "BLOCK_BYTES", 4 * 64 * 2 * ROWS)
    assert block_rows(256, 4 * 64) == 2 * ROWS
    test_modulated_norm(256, 64)


@pytest.mark.parametrize("tokens", [256, 512, 4096, 4352, 4608])
@pytest.mark.parametrize("width", [1152, 1536, 2432, 3072])
def test_blocks_of_tokens(tokens, width):
    """They divide the tokens, and have room in fast memory with what is computed of them."""
    rows = block_rows(tokens, 2 * width)
    assert tokens % rows == rows % ROWS == 0
    assert rows * width * (3 * 2 * 2 + 3 * 4) <= 16 * 2**20


def test_half_precision_is_rounded_once():
    """bfloat16 tokens: the kernels compute in float32, so they are as near as the plain form."""
    x = values(2, 256, 64, dtype=jnp.bfloat16)
    shift, scale = (values(2, 64, seed=seed, dtype=jnp.bfloat16) for seed in (1, 2))
    expected = modulated_by_hand(x, shift, scale)
    got = modulation_tpu.tpu(x, shift, scale, eps=EPS, interpret=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8, atol=1e-6)
    by, gain = turned(256, 16), values(16, seed=1)
    heads = x.reshape(2, 256, 4, 16)
    norm = head_norm(gain, jnp.bfloat16)
    kernel = head_norm_tpu.tpu(heads, gain, by, eps=EPS, dtype=jnp.bfloat16, interpret=True)
    np.testing.assert_array_equal(np.asarray(kernel), np.asarray(norm(heads, by)))


def test_kernels_are_divided_by_the_mesh():
    """Values and gradients are those of one device, whatever has a part of the batch and heads."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    x, scale, by = values(4, 128, 2, 16), values(16, seed=1), turned(128, 16)
    heads = functools.partial(head_norm_tpu.tpu, eps=EPS, dtype=jnp.float32, interpret=True)
    direction = values(4, 128, 2, 16, seed=2)
    call = with_gradients(lambda x, scale: heads(x, scale, by), direction)
    spec = PartitionSpec(("data", "fsdp"), None, "tensor")
    _agree_on_a_mesh(call, mesh, (x, scale), (spec, PartitionSpec()))
    tokens, vectors = values(4, 128, 32), [values(4, 32, seed=seed) for seed in (1, 2)]
    norm = functools.partial(modulation_tpu.tpu, eps=EPS, interpret=True)
    call = with_gradients(norm, values(4, 128, 32, seed=3))
    _agree_on_a_mesh(call, mesh, (tokens, *vectors), (PartitionSpec(("data", "fsdp")),) * 3)


def _agree_on_a_mesh(call, mesh, arrays, specs):
    expected = call(*arrays)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    with jax.set_mesh(mesh):
        got = call(*map(jax.device_put, arrays, shardings))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


def test_no_kernel_for_few_tokens_or_on_other_platforms(monkeypatch):
    """Programs for TPUs alone have kernels, and those of small images have none."""
    monkeypatch.setattr("jaxdiff.nn.platforms.has_tpu_compiler", lambda: True)
    vector = values(1, 64)
    for tokens, kernels in ((255, 0), (256, 1)):
        x = values(1, tokens, 64)
        traced = str(jax.make_jaxpr(modulation.modulated_norm)(x, vector, vector))
        assert traced.count("name=modulated_norm_forward") == kernels
        norm, heads = head_norm(values(16)), x.reshape(1, tokens, 4, 16)
        traced = str(jax.make_jaxpr(norm)(heads, turned(tokens, 16)))
        assert traced.count("name=head_norm_forward") == kernels
    np.testing.assert_allclose(
        modulated_norm(x, vector, vector, eps=EPS), modulated_by_hand(x, vector, vector), atol=1e-5
    )
