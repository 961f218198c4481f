"""Layer norms with a shift and a scale for each image, as kernels for TPUs.

The compiler alone reads the tokens twice for their moments, and computes the norm anew in each
product that reads it, which the product has to wait for. Here the tokens are read once and written
once, in either direction.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff.core.types import Array, Dtype, Float
from jaxdiff.nn.tpu_kernels import BATCH, on_each_device

Tokens = Float[Array, "b n d"]
Vectors = Float[Array, "b 1 d"]
BLOCK_BYTES = 2**19  # of tokens, at most, that a step of the grid processes
ROWS = 16  # of a block: as many as a register of two-byte numbers has
PARTS = 8  # sums of the vectors' gradients, one for each row of a register
SEMANTICS = ("parallel", "arbitrary")  # of the grid: images, and blocks of their tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KernelConfig:
    """What both kernels of one call share."""

    eps: float
    interpret: bool


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def tpu(
    x: Tokens,
    shift: Float[Array, "b d"],
    scale: Float[Array, "b d"],
    *,
    eps: float,
    interpret: bool = False,
) -> Tokens:
    """`modulation.modulated_norm` as a kernel for TPUs, on the devices of `on_each_device`.

    All of it is in float32, and the result in the dtype of x. `interpret` runs it on any platform,
    slowly, for tests.
    """

    def on_one_device(x: Array, shift: Array, scale: Array) -> Array:
        n = x.shape[1]
        config = _KernelConfig(eps=eps, interpret=interpret)
        padded = jnp.pad(x, ((0, 0), (0, -n % ROWS), (0, 0)))
        vectors = (each.astype(jnp.float32)[:, None] for each in (shift, scale))
        return cast(Array, _modulated(padded, *vectors, config))[:, :n]

    axes = ((BATCH, None, None), (BATCH, None), (BATCH, None))
    return on_each_device(on_one_device, (x, shift, scale), axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _modulated(x: Tokens, shift: Vectors, scale: Vectors, config: _KernelConfig) -> Array:
    return _call("forward", _forward_kernel, (x,), (shift, scale), [(x.shape, x.dtype)], config)[0]


def _modulated_fwd(x: Tokens, shift: Vectors, scale: Vectors, config: _KernelConfig):
    return _modulated(x, shift, scale, config), (x, scale)


def _modulated_bwd(config: _KernelConfig, saved: tuple[Array, Array], d_out: Tokens):
    x, scale = saved
    sums = ((len(x), PARTS, x.shape[2]), jnp.float32)
    out = [(x.shape, x.dtype), sums, sums]
    d_x, *of_vectors = _call("backward", _backward_kernel, (x, d_out), (scale,), out, config)
    d_shift, d_scale = (each.sum(1, keepdims=True) for each in of_vectors)
    return d_x, d_shift, d_scale


_modulated.defvjp(_modulated_fwd, _modulated_bwd)


def _call(
    direction: str,
    kernel: Callable[..., None],
    arrays: Sequence[Tokens],
    vectors: Sequence[Vectors],
    out: Sequence[tuple[tuple[int, ...], Dtype]],
    config: _KernelConfig,
) -> Sequence[Array]:
    """Run a kernel over all blocks; results whose shapes are not x's are sums over an image's."""
    # Imported where it is used: it takes a good part of a second, which only a TPU should pay.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    x = arrays[0]
    b, n, width = x.shape
    block = block_rows(n, width * x.dtype.itemsize)
    of_tokens = pl.BlockSpec((1, block, width), lambda b, i: (b, i, 0))

    def of_image(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, rows, width), lambda b, i: (b, 0, 0))

    return pl.pallas_call(
        functools.partial(kernel, config=config),
        grid=(b, n // block),
        in_specs=[*(of_tokens for _ in arrays), *(of_image(1) for _ in vectors)],
        out_specs=[of_tokens if shape == x.shape else of_image(PARTS) for shape, _ in out],
        out_shape=[jax.ShapeDtypeStruct(*each) for each in out],
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        interpret=config.interpret,
        name=f"modulated_norm_{direction}_{n}x{width}",
    )(*arrays, *vectors)


def block_rows(tokens: int, row_bytes: int) -> int:
    """The most tokens of BLOCK_BYTES at most, in whole registers, that divide `tokens`."""
    registers = tokens // ROWS
    most = max(BLOCK_BYTES // (row_bytes * ROWS), 1)
    return ROWS * max(i for i in range(1, min(most, registers) + 1) if registers % i == 0)


def _forward_kernel(x_ref, shift_ref, scale_ref, out_ref, *, config: _KernelConfig):
    """Norm and modulate one block of tokens."""
    normed, _ = _unit(x_ref, config)
    out_ref[0] = (normed * (1 + scale_ref[0]) + shift_ref[0]).astype(out_ref.dtype)


def _backward_kernel(
    x_ref, d_out_ref, scale_ref, d_x_ref, d_shift_ref, d_scale_ref, *, config: _KernelConfig
):
    """The gradient of one block of tokens, and its part of those of the vectors."""
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(1) == 0)
    def _():
        d_shift_ref[...] = jnp.zeros(d_shift_ref.shape, jnp.float32)
        d_scale_ref[...] = jnp.zeros(d_scale_ref.shape, jnp.float32)

    normed, factor = _unit(x_ref, config)
    d_out = d_out_ref[0].astype(jnp.float32)
    width = d_out.shape[1]
    d_shift_ref[0] += d_out.reshape(-1, PARTS, width).sum(0)
    d_scale_ref[0] += (d_out * normed).reshape(-1, PARTS, width).sum(0)
    d_normed = d_out * (1 + scale_ref[0])
    mean = d_normed.mean(1, keepdims=True)
    along = (d_normed * normed).mean(1, keepdims=True)
    d_x_ref[0] = (factor * (d_normed - mean - normed * along)).astype(d_x_ref.dtype)


def _unit(
    x_ref: Any, config: _KernelConfig
) -> tuple[Float[Array, "block d"], Float[Array, "block 1"]]:
    """A block with zero mean and unit variance, and what it was multiplied by; float32."""
    x = x_ref[0].astype(jnp.float32)
    centred = x - x.mean(1, keepdims=True)
    factor = lax.rsqrt((centred * centred).mean(1, keepdims=True) + config.eps)
    return centred * factor, factor
