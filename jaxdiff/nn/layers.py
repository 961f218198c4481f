"""The layers that hold the weights, and the factory that gives one model's layers their dtypes.

Kernels are (in, out) for linear layers and HWIO for convolutions, arrays are NHWC. Parameters are
kept in `param_dtype` and used in `dtype`; norms take their statistics in float32 in any dtype.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.nn.initializers import ONES, ZEROS, Initializer, Normal, lecun_normal
from jaxdiff.nn.norms import broadcast_last, group_norm, layer_norm
from jaxdiff.nn.platforms import platform_dependent

Padding = tuple[tuple[int, int], tuple[int, int]]
ALL = slice(None)


class Linear(nnx.Module):
    """y = x W + b on the last axis."""

    def __init__(self, kernel: nnx.Param, bias: nnx.Param | None, *, dtype: Dtype):
        self.kernel = kernel
        self.bias = bias
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """Apply the layer, in its compute dtype."""
        return self._biased(self.product(x))

    def split_outputs(self, x: Float[Array, "... i"]) -> tuple[Float[Array, "... o"], ...]:
        """The first and the second half of the outputs."""
        middle = self.kernel.shape[-1] // 2
        # Not a split of the outputs: its gradient would join the halves in a pass of its own.
        halves = slice(middle), slice(middle, None)
        return tuple(self._biased(self.product(x, columns=half), half) for half in halves)

    def of_parts(self, *parts: Float[Array, "... _"]) -> Float[Array, "... o"]:
        """The layer of these arrays side by side, without a pass that joins them."""
        first, products = 0, []
        for part in parts:
            last = first + part.shape[-1]
            products.append(self.product(part, rows=slice(first, last)))
            first = last
        return self._biased(sum(products[1:], products[0]))

    def product(
        self, x: Float[Array, "... i"], *, rows: slice = ALL, columns: slice = ALL
    ) -> Float[Array, "... o"]:
        """x times these rows and columns of W."""

        def as_rows(x: Array, kernel: Array) -> Array:
            return jnp.dot(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)

        # As one matrix, for XLA on the CPU is slow at weight gradients that sum over several axes.
        # On a TPU tokens keep to their images, or attention has them turned before and after it.
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)[rows, columns]
        as_it_is = _vector_product if x.ndim == 2 else jnp.dot
        return platform_dependent(x, kernel, tpu=as_it_is, default=as_rows)

    def _biased(self, y: Float[Array, "... o"], columns: slice = ALL) -> Float[Array, "... o"]:
        if self.bias is None:
            return y
        return y + broadcast_last(self.bias[...].astype(self.dtype)[columns], y.ndim)


def _vector_product(x: Float[Array, "b i"], kernel: Float[Array, "i o"]) -> Float[Array, "b o"]:
    """x W of each row twice: of one row, which a chip may have, a TPU uses no matrix units."""
    return jnp.dot(jnp.stack([x, x], axis=1), kernel)[:, 0]


class Conv(nnx.Module):
    """2-D convolution (cross-correlation, as in every deep-learning library) with a bias."""

    def __init__(
        self,
        kernel: nnx.Param,
        bias: nnx.Param | None,
        *,
        stride: int,
        padding: Padding,
        dtype: Dtype,
    ):
        self.kernel = kernel
        self.bias = bias
        self.stride = stride
        self.padding = padding
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Apply the layer, in its compute dtype."""
        y = self._convolve(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + broadcast_last(self.bias[...].astype(self.dtype), 4)

    def _convolve(
        self, x: Float[Array, "b h w i"], kernel: Float[Array, "k l i o"]
    ) -> Float[Array, "b h2 w2 o"]:
        def convolve(x: Array, kernel: Array) -> Array:
            return lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(self.stride, self.stride),
                padding=self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        def matmul(x: Array, kernel: Array) -> Array:
            return jnp.dot(x, kernel[0, 0])

        if kernel.shape[:2] == (1, 1) and self.stride == 1 and not np.any(self.padding):
            # On a TPU pixels that become tokens would be turned once more after a convolution.
            return platform_dependent(x, kernel, tpu=matmul, default=convolve)
        return convolve(x, kernel)


class Embed(nnx.Module):
    """A table of vectors, looked up by integer."""

    def __init__(self, embedding: nnx.Param, *, dtype: Dtype):
        self.embedding = embedding
        self.dtype = dtype

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... d"]:
        """The vectors of `ids`; an id outside the table takes the nearest row."""
        table = self.embedding[...].astype(self.dtype)
        return jnp.take(table, ids, axis=0, mode="clip")


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the last axis (Ba et al. 2016), then scale and bias."""

    def __init__(self, scale: nnx.Param, bias: nnx.Param, *, eps: float, dtype: Dtype):
        self.scale = scale
        self.bias = bias
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """Normalise in float32, return in the compute dtype."""
        normed = layer_norm(x, self.scale[...], self.bias[...], self.eps)
        return cast(Array, normed).astype(self.dtype)


class RMSNorm(nnx.Module):
    """Unit mean square over the last axis (Zhang & Sennrich 2019), then scale."""

    def __init__(self, scale: nnx.Param, *, eps: float, dtype: Dtype):
        self.scale = scale
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """Normalise in float32, return in the compute dtype."""
        return self.normalise(x, self.scale[...])

    def normalise(
        self, x: Float[Array, "... c"], scale: Float[Array, "c"]
    ) -> Float[Array, "... c"]:
        """The same with this `scale`."""
        x32 = x.astype(jnp.float32)
        normed = x32 * lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (normed * broadcast_last(scale.astype(jnp.float32), x.ndim)).astype(self.dtype)


class GroupNorm(nnx.Module):
    """Zero mean and unit variance over space and a group of channels (Wu & He 2018)."""

    def __init__(self, scale: nnx.Param, bias: nnx.Param, *, groups: int, eps: float, dtype: Dtype):
        self.scale = scale
        self.bias = bias
        self.groups = groups
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        """Normalise in float32, return in the compute dtype."""
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        normed = group_norm(flat, self.scale[...], self.bias[...], self.groups, self.eps)
        return cast(Array, normed).reshape(x.shape).astype(self.dtype)


class Placeholder(nnx.Module):
    """Holds a list position where a checkpoint's numbering counts a layer without weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFactory:
    """Makes the layers of one model: the choices that all of them share."""

    rngs: nnx.Rngs | None  # None: weights are shapes only
    dtype: Dtype = jnp.float32  # of the computation
    param_dtype: Dtype = jnp.float32  # of the stored weights
    attention: str = "auto"  # attention back end, see nn.attention.BACKENDS
    remat: str = "none"  # rematerialisation of each block, see nn.remat.REMAT

    def param(self, init: Initializer, shape: tuple[int, ...]) -> nnx.Param:
        """A weight with the initializer `init`."""
        if self.rngs is None:
            value = jax.ShapeDtypeStruct(shape, self.param_dtype)
        else:
            value = init(self.rngs.params(), shape, self.param_dtype)
        return nnx.Param(value, init=init)

    def linear(
        self, n_in: int, n_out: int, *, bias: bool = True, init: Initializer | None = None
    ) -> Linear:
        """A linear layer; by default the kernel keeps the variance of its input. Zero bias."""
        shape = (n_in, n_out)
        b = self.param(ZEROS, (n_out,)) if bias else None
        return Linear(self.param(init or lecun_normal(shape), shape), b, dtype=self.dtype)

    def conv(
        self,
        n_in: int,
        n_out: int,
        size: int,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        bias: bool = True,
        init: Initializer | None = None,
    ) -> Conv:
        """A size x size convolution; padding None is (size - 1) // 2 on each side."""
        shape = (size, size, n_in, n_out)
        side = ((size - 1) // 2, (size - 1) // 2)
        return Conv(
            self.param(init or lecun_normal(shape), shape),
            self.param(ZEROS, (n_out,)) if bias else None,
            stride=stride,
            padding=(side, side) if padding is None else padding,
            dtype=self.dtype,
        )

    def embed(self, rows: int, width: int, *, std: float = 0.02) -> Embed:
        """A table of `rows` vectors with Gaussian initial values."""
        return Embed(self.param(Normal(std), (rows, width)), dtype=self.dtype)

    def layer_norm(self, width: int, *, eps: float = 1e-5) -> LayerNorm:
        """A layer norm with scale one and bias zero."""
        scale, bias = self.param(ONES, (width,)), self.param(ZEROS, (width,))
        return LayerNorm(scale, bias, eps=eps, dtype=self.dtype)

    def rms_norm(self, width: int, *, eps: float = 1e-6) -> RMSNorm:
        """A norm by the root mean square with scale one."""
        return RMSNorm(self.param(ONES, (width,)), eps=eps, dtype=self.dtype)

    def group_norm(self, channels: int, *, groups: int, eps: float) -> GroupNorm:
        """A group norm with scale one and bias zero; `groups` must divide `channels`."""
        if groups < 1 or channels % groups:
            raise InputError(
                f"norm_num_groups: got {groups}, expected a divisor of {channels} channels"
            )
        scale, bias = self.param(ONES, (channels,)), self.param(ZEROS, (channels,))
        return GroupNorm(scale, bias, groups=groups, eps=eps, dtype=self.dtype)
