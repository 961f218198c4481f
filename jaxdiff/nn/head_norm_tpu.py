"""The norm of queries and keys by head, and their rotation, as one kernel for TPUs.

The compiler alone makes about six passes of these over arrays in float32. Here each number is read
once and written once, in either direction. Tokens are columns (nn.tpu_kernels), so the sum over a
head's width goes over rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdiff.core.types import Array, Dtype, Float
from jaxdiff.nn.rotary import Rotation
from jaxdiff.nn.tpu_kernels import (
    BY_HEAD,
    LANES,
    as_columns,
    as_tokens,
    divisor,
    on_each_device,
    whole_registers,
)

Columns = Float[Array, "h d bn"]
Scale = Float[Array, "d 1"]
Tables = tuple[Float[Array, "d n"], ...]  # cosines and sines, or nothing
BLOCK = 2048  # columns, at most, that a step of the grid processes
# Of a grid: images and blocks of tokens, and heads, which share the tables of these.
SEMANTICS = ("parallel", "parallel", "arbitrary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KernelConfig:
    """What both kernels of one call share."""

    batch: int
    eps: float
    dtype: Dtype  # of the result
    interpret: bool


@functools.partial(jax.jit, static_argnames=("eps", "dtype", "interpret"))
def tpu(
    x: Float[Array, "b n h d"],
    scale: Float[Array, "d"],
    by: Rotation | None,
    *,
    eps: float,
    dtype: Dtype,
    interpret: bool = False,
) -> Float[Array, "b n h d"]:
    """`head_norm.plain` as a kernel for TPUs, on the devices of `on_each_device`.

    No gradient flows into `by`. `interpret` runs it on any platform, slowly, for tests.
    """

    def on_one_device(x: Array, scale: Array, *tables: Array) -> Array:
        b, n = x.shape[:2]
        config = _KernelConfig(batch=b, eps=eps, dtype=jnp.dtype(dtype), interpret=interpret)
        padding = ((0, 0), (0, whole_registers(n) - n))
        columns = tuple(jnp.pad(table.T, padding) for table in tables)
        out = _normed(as_columns(x), scale.astype(jnp.float32)[:, None], columns, config)
        return as_tokens(cast(Array, out), b, n)

    tables = by or ()
    axes = (BY_HEAD, (None,), *((None, None) for _ in tables))
    return on_each_device(on_one_device, (x, scale, *tables), axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normed(x: Columns, scale: Scale, tables: Tables, config: _KernelConfig) -> Array:
    return _forward(x, scale, tables, config)


def _normed_fwd(x: Columns, scale: Scale, tables: Tables, config: _KernelConfig):
    return _forward(x, scale, tables, config), (x, scale, tables)


def _normed_bwd(config: _KernelConfig, saved: tuple[Any, ...], d_out: Columns):
    x, scale, tables = saved
    d_x, d_scale = _backward(x, scale, tables, d_out, config)
    return d_x, d_scale, tuple(jnp.zeros_like(table) for table in tables)


_normed.defvjp(_normed_fwd, _normed_bwd)


def _forward(x: Columns, scale: Scale, tables: Tables, config: _KernelConfig) -> Columns:
    call = functools.partial(_call, "forward", config=config, tables=tables)
    return call(_forward_kernel, (x,), scale, out=[(x.shape, config.dtype)])[0]


def _backward(
    x: Columns, scale: Scale, tables: Tables, d_out: Columns, config: _KernelConfig
) -> tuple[Columns, Scale]:
    """The gradients of x and scale."""
    call = functools.partial(_call, "backward", config=config, tables=tables)
    sums = (*x.shape[:2], LANES * (x.shape[2] // _block(x, config)))
    d_x, d_scale = call(
        _backward_kernel, (x, d_out), scale, out=[(x.shape, x.dtype), (sums, jnp.float32)]
    )
    return d_x, d_scale.sum((0, 2))[:, None]


def _block(x: Columns, config: _KernelConfig) -> int:
    """The columns of one step of the grid."""
    return divisor(x.shape[2] // config.batch, BLOCK)


def _call(
    direction: str,
    kernel: Callable[..., None],
    arrays: tuple[Columns, ...],
    scale: Scale,
    *,
    out: list[tuple[tuple[int, ...], Dtype]],
    tables: Tables,
    config: _KernelConfig,
) -> Sequence[Array]:
    """Run a kernel over all blocks; results of `out`'s shapes have as many blocks as the arrays."""
    # Imported where it is used: it takes a good part of a second, which only a TPU should pay.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    heads, width, columns = arrays[0].shape
    block = _block(arrays[0], config)
    steps = columns // (config.batch * block)

    def of_block(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, width, lanes), lambda b, i, h: (h, 0, b * steps + i))

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda b, i, h: (0, 0))

    matrix = (jnp.asarray(exchange(width, config.dtype)),) if tables else ()
    of_tokens = pl.BlockSpec((width, block), lambda b, i, h: (0, i))
    return pl.pallas_call(
        functools.partial(kernel, config=config),
        grid=(config.batch, steps, heads),
        in_specs=[
            *(of_block(block) for _ in arrays),
            *map(whole, (scale, *matrix)),
            *(of_tokens for _ in tables),
        ],
        out_specs=[of_block(shape[2] * block // columns) for shape, _ in out],
        out_shape=[jax.ShapeDtypeStruct(*each) for each in out],
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        interpret=config.interpret,
        name=f"head_norm_{direction}_{columns // config.batch}",
    )(*arrays, scale, *matrix, *tables)


def exchange(width: int, dtype: Dtype) -> Float[np.ndarray, "d d"]:
    """The matrix E of 0, 1 and -1 for which E' y has -y[2 j + 1] and y[2 j] at 2 j and 2 j + 1.

    A product with it is exact, and takes a tenth of the time of moving rows.
    """
    return np.kron(np.identity(width // 2), np.array([[0, 1], [-1, 0]])).astype(dtype)


def _forward_kernel(x_ref, scale_ref, *refs, config: _KernelConfig):
    """Norm, scale and rotate one block of a head."""
    *tables, out_ref = refs
    normed, _ = _unit(x_ref, config)
    y = (normed * scale_ref[...]).astype(config.dtype)
    out_ref[0] = _turned(y, tables, 1).astype(config.dtype)


def _backward_kernel(x_ref, d_out_ref, scale_ref, *refs, config: _KernelConfig):
    """The gradient of one block of a head, and its part of the scale's, by lane."""
    *tables, d_x_ref, d_scale_ref = refs
    d_y = _turned(d_out_ref[0], tables, -1)
    normed, factor = _unit(x_ref, config)
    along = d_y * normed
    of_scale = along[:, :LANES]
    for start in range(LANES, along.shape[1], LANES):
        of_scale += along[:, start : start + LANES]
    d_scale_ref[0] = of_scale
    d_normed = d_y * scale_ref[...]
    mean = (along * scale_ref[...]).mean(0, keepdims=True)
    d_x_ref[0] = (factor * (d_normed - normed * mean)).astype(d_x_ref.dtype)


def _unit(
    x_ref: Any, config: _KernelConfig
) -> tuple[Float[Array, "d block"], Float[Array, "1 block"]]:
    """A block with unit mean squares, and what it was multiplied by; float32."""
    x = x_ref[0].astype(jnp.float32)
    factor = lax.rsqrt((x * x).mean(0, keepdims=True) + config.eps)
    return x * factor, factor


def _turned(
    y: Float[Array, "d block"], tables: list[Any], direction: int
) -> Float[Array, "d block"]:
    """`y` rotated, backwards for -1: the channels of a pair have the same angle; float32."""
    if not tables:
        return y.astype(jnp.float32)
    matrix, cos, sin = (ref[...] for ref in tables)
    exchanged = lax.dot_general(
        matrix,
        y,
        (((0 if direction == 1 else 1,), (0,)), ((), ())),
        precision=None if y.dtype == jnp.bfloat16 else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.astype(jnp.float32) * cos + exchanged * sin
