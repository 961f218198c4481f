"""A VAE in overlapping tiles, so that its memory does not grow with the image."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from jaxdiff.core.types import Bool, Float, NDArray, UInt8
from jaxdiff.pipeline.compiled_model import CompiledModel
from jaxdiff.pipeline.programs import BatchArray

MAX_UNTILED = 2048 * 2048  # pixels that the VAE processes without tiles
TILE = 1024  # side of the tiles of larger images, in pixels
OVERLAP = 4  # a tile shares 1 / OVERLAP of its length with the next


def decode_tiles(
    stages: CompiledModel, latents: BatchArray, tile: int, downscale: int
) -> tuple[UInt8[NDArray, "b h2 w2 3"], Bool[NDArray, "b"]]:
    """Images of latents on the devices, in tiles of `tile` pixels, and which are finite."""
    flags = []

    def decode(part: NDArray) -> NDArray:
        images, finite = stages.decode(stages.shard(part))
        flags.append(stages.gather(finite))
        return stages.gather(images)

    whole, zoom = stages.gather(latents), Fraction(downscale)
    images = tiled(decode, whole, tile=tile // downscale, multiple=1, zoom=zoom)
    return np.round(images).astype(np.uint8), np.all(flags, axis=0)


def encode_tiles(
    stages: CompiledModel, images: Float[NDArray, "b h2 w2 3"], tile: int, downscale: int
) -> BatchArray:
    """Latents on the devices of images in [-1, 1], in tiles of `tile` pixels."""

    def encode(part: NDArray) -> NDArray:
        return stages.gather(stages.latents(stages.shard(part)))

    zoom = Fraction(1, downscale)
    return stages.shard(tiled(encode, images, tile=tile, multiple=downscale, zoom=zoom))


def starts(length: int, tile: int, step: int) -> list[int]:
    """Where tiles begin: `step` apart, the last one flush with the end."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, step), length - tile]


def blend_weights(tile: int, shared: int) -> Float[NDArray, "n"]:
    """Weights along a tile: rising and falling linearly over what it shares with its neighbours."""
    rise = (np.arange(tile) + 1) / (shared + 1)
    return np.minimum(1, np.minimum(rise, rise[::-1])).astype(np.float32)


def tiled(
    function: Callable[[NDArray], NDArray],
    array: NDArray,
    *,
    tile: int,
    multiple: int,
    zoom: Fraction,
) -> Float[NDArray, "b h w c"]:
    """`function` of (b, h, w, c), which maps lengths n to n `zoom`, from its values on tiles.

    Tiles are `tile` long and start at multiples of `multiple`. They are all of one size, so that
    one program serves all. Where they overlap they are blended; elsewhere nothing is changed.
    """
    height, width = array.shape[1:3]
    size = (min(tile, height), min(tile, width))
    shared = max(tile // OVERLAP // multiple, 1) * multiple
    weights = np.outer(*(blend_weights(int(n * zoom), int(shared * zoom)) for n in size))[..., None]
    total = np.zeros((), np.float32)
    norm = np.zeros((int(height * zoom), int(width * zoom), 1), np.float32)
    for top in starts(height, tile, tile - shared):
        for left in starts(width, tile, tile - shared):
            part = function(array[:, top : top + size[0], left : left + size[1]])
            if not total.ndim:
                total = np.zeros((len(part), *norm.shape[:2], part.shape[-1]), np.float32)
            y, x = int(top * zoom), int(left * zoom)
            rows, columns = slice(y, y + part.shape[1]), slice(x, x + part.shape[2])
            total[:, rows, columns] += weights * part
            norm[rows, columns] += weights
    return total / norm
