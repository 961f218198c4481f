"""Layer norm and group norm with gradients of their own: few passes over the large arrays.

In float32 whatever the inputs are. Backwards there is one pass that sums and one that changes each
number, and everything between them is small. Automatic differentiation of the same equations asks
for up to three of each, and for float32 arrays between them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff.core.types import Array, Float
from jaxdiff.nn.remat import save_for_backward

Rows = Float[Array, "*n c"]
Image = Float[Array, "b p c"]
Channels = Float[Array, "c"]


def broadcast_last(vector: Channels, ndim: int) -> Float[Array, "..."]:
    """`vector` with leading axes of length one, so that it broadcasts along the last of `ndim`."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


def _broadcast_float32(vector: Channels, ndim: int) -> Float[Array, "..."]:
    return broadcast_last(vector.astype(jnp.float32), ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Rows, scale: Channels, bias: Channels, eps: float) -> Float[Array, "*n c"]:
    """Zero mean and unit variance of each row (Ba et al. 2016), then scale and bias; float32."""
    return _layer_norm_fwd(x, scale, bias, eps)[0]


def _layer_norm_fwd(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, tuple]:
    x32 = x.astype(jnp.float32)
    mean = save_for_backward(x32.mean(-1, keepdims=True))
    variance = save_for_backward(jnp.square(x32 - mean).mean(-1, keepdims=True))
    deviation = lax.rsqrt(variance + eps)
    normed = (x32 - mean) * deviation * _broadcast_float32(scale, x.ndim) + _broadcast_float32(
        bias, x.ndim
    )
    return normed, (x, scale, bias, mean, deviation)


def _layer_norm_bwd(eps: float, saved: tuple, g: Array) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, deviation = saved
    normed = (x.astype(jnp.float32) - mean) * deviation
    scaled = g * _broadcast_float32(scale, x.ndim)
    along = (scaled * normed).mean(-1, keepdims=True)
    d_x = deviation * (scaled - scaled.mean(-1, keepdims=True) - normed * along)
    rows = tuple(range(x.ndim - 1))
    d_scale, d_bias = (g * normed).sum(rows), g.sum(rows)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def _moments(x: Image) -> tuple[Float[Array, "b 1 c"], Float[Array, "b 1 c"]]:
    """Mean and variance over space, by sums in a single pass.

    The sums are of differences from the first of the n numbers (Chan, Golub & LeVeque 1983). It is
    at most sqrt(n) deviations from their mean, so wherever that is the variance loses no more than
    a factor of n of its precision.
    """
    first = x[:, :1]
    moved = x - first
    mean = moved.mean(1, keepdims=True)
    variance = jnp.square(moved).mean(1, keepdims=True) - jnp.square(mean)
    return first + mean, jnp.maximum(variance, 0)


def _group_mean(values: Float[Array, "b 1 c"], groups: int) -> Float[Array, "b 1 c"]:
    b, _, c = values.shape
    mean = values.reshape(b, groups, c // groups).mean(-1, keepdims=True)
    return jnp.repeat(mean, c // groups, axis=-1).reshape(b, 1, c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(
    x: Image, scale: Channels, bias: Channels, groups: int, eps: float
) -> Float[Array, "b p c"]:
    """Zero mean and unit variance over space and a group of channels (Wu & He 2018); float32."""
    return _group_norm_fwd(x, scale, bias, groups, eps)[0]


def _group_norm_fwd(
    x: Array, scale: Array, bias: Array, groups: int, eps: float
) -> tuple[Array, tuple]:
    # Over space by channel first, then of the few results over groups: a reduction over both at
    # once on a split channel axis is four times slower on the CPU.
    x32 = x.astype(jnp.float32)
    by_channel, inside = _moments(x32)
    mean = save_for_backward(_group_mean(by_channel, groups))
    variance = save_for_backward(_group_mean(inside + jnp.square(by_channel - mean), groups))
    deviation = lax.rsqrt(variance + eps)
    normed = (x32 - mean) * (deviation * _broadcast_float32(scale, 3)) + _broadcast_float32(bias, 3)
    return normed, (x, scale, bias, mean, deviation)


def _group_norm_bwd(groups: int, eps: float, saved: tuple, g: Array) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, deviation = saved
    centred = x.astype(jnp.float32) - mean
    # By channel: the mean over space of the gradient, and of it times what was normalised.
    plain, along = g.mean(1, keepdims=True), (g * centred).mean(1, keepdims=True) * deviation
    d_scale, d_bias = (x.shape[1] * value.sum((0, 1)) for value in (along, plain))
    flat, tilt = (
        _group_mean(value * _broadcast_float32(scale, 3), groups) for value in (plain, along)
    )
    d_x = deviation * (g * _broadcast_float32(scale, 3) - centred * (deviation * tilt) - flat)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


group_norm.defvjp(_group_norm_fwd, _group_norm_bwd)
