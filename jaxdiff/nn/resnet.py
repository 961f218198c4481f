"""Residual convolution blocks and changes of resolution, with diffusers' parameter names."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Float
from jaxdiff.nn.activations import activation
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.remat import remat


def resize_nearest(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Resize to `size` (rows, columns) by taking pixel floor(i * old / new) for the new pixel i."""
    b, h, w, c = x.shape
    if size == (2 * h, 2 * w):
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return doubled.reshape(b, 2 * h, 2 * w, c)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (h, w), strict=True))
    return x[:, rows][:, :, columns]


def double_resolution(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Each pixel as two rows of two."""
    return resize_nearest(x, (2 * x.shape[1], 2 * x.shape[2]))


def halve_resolution(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The mean of each two rows of two pixels; an even number of rows and columns."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


RESAMPLE: dict[str, Callable[[Array], Array]] = {
    "up": double_resolution,
    "down": halve_resolution,
}


class ResnetBlock(nnx.Module):
    """norm, act, conv, + time, norm, act, conv, + input (Ho et al. 2020, appendix B).

    With `scale_shift` the time embedding scales and shifts the second norm's output instead
    (Dhariwal & Nichol 2021). `zero_init` starts the block as the identity. The sum is divided by
    `output_scale`. With `resample` "up" or "down" the block doubles or halves the resolution,
    before its first convolution and of its input. `time_act` False takes a time embedding that an
    activation function has already seen.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        layers: LayerFactory,
        groups: int,
        eps: float,
        act: str,
        time_width: int | None = None,
        scale_shift: bool = False,
        output_scale: float = 1.0,
        zero_init: bool = False,
        resample: str | None = None,
        time_act: bool = True,
    ):
        self.norm1 = layers.group_norm(n_in, groups=groups, eps=eps)
        self.conv1 = layers.conv(n_in, n_out, 3)
        shifts = 2 * n_out if scale_shift else n_out
        self.time_emb_proj = layers.linear(time_width, shifts) if time_width else None
        self.norm2 = layers.group_norm(n_out, groups=groups, eps=eps)
        self.conv2 = layers.conv(n_out, n_out, 3, init=ZEROS if zero_init else None)
        self.conv_shortcut = None if n_in == n_out else layers.conv(n_in, n_out, 1)
        self.act = act
        self.scale_shift = scale_shift
        self.output_scale = output_scale
        self.resample = resample
        self.time_act = time_act
        self.remat = layers.remat

    @remat
    def __call__(
        self, x: Float[Array, "b h w i"], time: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """Apply the block; `time` is needed exactly when the block was built with `time_width`."""
        act = activation(self.act)
        h = act(self.norm1(x))
        if self.resample is not None:
            x, h = (RESAMPLE[self.resample](each) for each in (x, h))
        h = self.conv1(h)
        if self.time_emb_proj is None or time is None:
            h = self.norm2(h)
        else:
            shift = self.time_emb_proj(act(time) if self.time_act else time)[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(shift, 2, axis=-1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + shift)
        h = self.conv2(act(h))
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return (skip + h) / self.output_scale if self.output_scale != 1.0 else skip + h


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int, *, layers: LayerFactory):
        self.conv = layers.conv(channels, channels, 3)

    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "b h2 w2 c"]:
        """Double the resolution, or make it `size` (rows, columns)."""
        return self.conv(resize_nearest(x, size) if size else double_resolution(x))


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2; padding 1 all around, or 0: one row and column at the end."""

    def __init__(self, channels: int, *, layers: LayerFactory, padding: int):
        side = (1, 1) if padding else (0, 1)
        self.conv = layers.conv(channels, channels, 3, stride=2, padding=(side, side))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Halve the resolution."""
        return self.conv(x)
