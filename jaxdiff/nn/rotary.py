"""Rotary positions (RoPE, 2104.09864): pairs of channels turn by angles of a token's position."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Float, Int

THETA = 10000.0


class Rotation(NamedTuple):
    """Cosine and sine by which each pair of channels of a query or key is rotated."""

    cos: Float[Array, "n d"]
    sin: Float[Array, "n d"]

    def part(self, tokens: slice) -> "Rotation":
        """The rotation of these tokens."""
        return Rotation(self.cos[tokens], self.sin[tokens])


def rotation(ids: Int[Array, "n a"], axes_dims: tuple[int, ...]) -> Rotation:
    """The rotary embedding of positions on several axes (RoPE, 2104.09864, eq. 15), in float32.

    Axis i has the next `axes_dims[i]` channels, whose pairs turn by position * 10000^(-2 j / dim).
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = THETA ** -(np.arange(0, dim, 2) / dim)
        positions = ids[:, axis].astype(jnp.float32)
        angles.append(positions[:, None] * jnp.asarray(frequencies, jnp.float32)[None])
    pairs = jnp.repeat(jnp.concatenate(angles, axis=-1), 2, axis=-1)
    return Rotation(jnp.cos(pairs), jnp.sin(pairs))


def rotate(x: Float[Array, "b n h d"], by: Rotation) -> Float[Array, "b n h d"]:
    """`x` with its channels 2 j and 2 j + 1 rotated as a plane; in float32, returned as x."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    cos, sin = (table[None, :, None] for table in by)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
