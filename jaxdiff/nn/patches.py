"""Images as tokens, a patch each, with fixed positions, and back (2010.11929, 2212.09748).

Positions are sines and cosines of column and row, which a model may have learnt at another size.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, Key, NDArray
from jaxdiff.nn.layers import LayerFactory


def sincos_positions(
    grid: tuple[int, int], width: int, *, base: int, scale: float = 1.0
) -> Float[NDArray, "n {width}"]:
    """Embeddings of the patches of a `grid` of rows and columns, row by row, in float32.

    The first half of `width`, a multiple of 4, has sines and then cosines of the column at
    frequencies 10000^(-i / (width / 4)), the second half those of the row. Rows and columns count
    from 0 up to `base` / `scale`, whatever the grid: patches of a larger image are closer together.
    """
    rows, columns = (
        np.arange(n, dtype=np.float32) / np.float32(n / base) / np.float32(scale) for n in grid
    )
    y, x = np.meshgrid(rows, columns, indexing="ij")
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    halves = [np.outer(axis.ravel().astype(np.float64), omega) for axis in (x, y)]
    parts = [function(angles) for angles in halves for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class SinCosTable:
    """Initial values of a stored table (1, n, width) of `sincos_positions` of a square grid."""

    base: int
    scale: float = 1.0

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Dtype) -> Array:
        """The values as a JAX array; the key is not needed."""
        return jnp.asarray(self._values(shape), dtype)

    def numpy(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The values as a numpy array; the generator is not needed."""
        return self._values(shape)

    def _values(self, shape: tuple[int, ...]) -> np.ndarray:
        side = math.isqrt(shape[1])
        return sincos_positions((side, side), shape[2], base=self.base, scale=self.scale)[None]


class PatchEmbed(nnx.Module):
    """Patches of an image through one linear map, plus their positions.

    Positions are `sincos_positions`, whose rows and columns count from 0 to `base` / `scale`. With
    `max_size` they are a stored table of so many rows and columns, of which an image gets the
    centre (SD3, 2403.03206); no gradient changes it.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        patch_size: int,
        *,
        layers: LayerFactory,
        base: int,
        scale: float = 1.0,
        max_size: int | None = None,
    ):
        if width % 4:
            raise InputError(f"width: got {width}, expected a multiple of 4 for its positions")
        self.proj = layers.conv(
            channels, width, patch_size, stride=patch_size, padding=((0, 0), (0, 0))
        )
        table = SinCosTable(base, scale)
        self.pos_embed = (
            None if max_size is None else layers.param(table, (1, max_size * max_size, width))
        )
        self.width, self.patch_size = width, patch_size
        self.base, self.scale, self.max_size = base, scale, max_size

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        """A token for each patch, row by row; InputError for sides that are no whole patches."""
        grid = self.grid((x.shape[1], x.shape[2]))
        tokens = self.proj(x).reshape(x.shape[0], grid[0] * grid[1], self.width)
        return tokens + self._positions(grid).astype(tokens.dtype)[None]

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of `size`; InputError if there are none."""
        for name, length in zip(("height", "width"), size, strict=True):
            if length % self.patch_size or not length:
                raise InputError(
                    f"latent {name}: got {length}, expected a multiple of the patch size "
                    f"{self.patch_size}"
                )
        return size[0] // self.patch_size, size[1] // self.patch_size

    def _positions(self, grid: tuple[int, int]) -> Float[Array, "n d"]:
        if self.pos_embed is None or self.max_size is None:
            return jnp.asarray(sincos_positions(grid, self.width, base=self.base, scale=self.scale))
        side = self.max_size
        for name, length in zip(("rows", "columns"), grid, strict=True):
            if length > side:
                raise InputError(f"{name} of patches: got {length}, expected at most {side}")
        table = lax.stop_gradient(self.pos_embed[...]).reshape(side, side, self.width)
        top, left = ((side - length) // 2 for length in grid)
        return table[top : top + grid[0], left : left + grid[1]].reshape(-1, self.width)


def unpatchify(
    tokens: Float[Array, "b n e"], grid: tuple[int, int], patch_size: int
) -> Float[Array, "b h w c"]:
    """The image of tokens on a `grid`, each the pixels of its patch row by row, channels last."""
    (rows, columns), p = grid, patch_size
    pixels = tokens.reshape(len(tokens), rows, columns, p, p, -1)
    return pixels.swapaxes(2, 3).reshape(len(tokens), rows * p, columns * p, -1)
