"""Pictures, masks and latents that a call begins with, as arrays of the wanted size."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray

ImageInput = Any  # a PIL image, an array, or a sequence of either


def image_size(image: ImageInput) -> tuple[int, int] | None:
    """Height and width of the first image; None for latents and for None."""
    first = image[0] if isinstance(image, list | tuple) and image else image
    if isinstance(first, Image.Image):
        return first.height, first.width
    shape = np.shape(first)
    return (shape[-3], shape[-2]) if len(shape) >= 3 and shape[-1] == 3 else None


def count_of(image: ImageInput) -> int:
    """The number of images or latents."""
    if image is None or isinstance(image, Image.Image):
        return 1
    return len(image) if isinstance(image, list | tuple) or np.ndim(image) == 4 else 1


def are_latents(image: ImageInput, channels: int) -> bool:
    """Whether `image` is floating point with as many channels as latents have."""
    return (
        not isinstance(image, list | tuple | Image.Image | None)
        and np.ndim(image) in (3, 4)
        and np.shape(image)[-1] == channels
        and np.issubdtype(np.asarray(image).dtype, np.floating)
    )


def image_array(image: ImageInput, height: int, width: int) -> Float[NDArray, "b h w 3"]:
    """Pictures in [-1, 1], resized where they have another size.

    Arrays are uint8, (h, w, 3) or (b, h, w, 3). Raises InputError.
    """
    rows = [_to_pil(item, "RGB") for item in _items(image, "image", 3)]
    return np.stack([_array(row, height, width) for row in rows]) / 127.5 - 1


def masks(mask: ImageInput, height: int, width: int) -> Float[NDArray, "b h w 1"]:
    """1 where the mask is at least half white, which is where the image is repainted, else 0.

    Arrays are bool, or uint8, or floating point in [0, 1]; (h, w) or (b, h, w). Raises InputError.
    """
    rows = [_to_pil(item, "L") for item in _items(mask, "mask", None)]
    grey = np.stack([_array(row, height, width) for row in rows])
    return (grey >= 127.5).astype(np.float32)[..., None]


def _items(value: ImageInput, name: str, channels: int | None) -> list[Any]:
    """The images of a value as a list."""
    if isinstance(value, Image.Image):
        return [value]
    if isinstance(value, list | tuple):
        return [item for part in value for item in _items(part, name, channels)]
    array = np.asarray(value)
    single = 2 if channels is None else 3
    right = channels is None or array.shape[-1:] == (channels,)
    if array.dtype == object or array.ndim not in (single, single + 1) or not right:
        wanted = "(b, h, w)" if channels is None else f"(b, h, w, {channels})"
        raise InputError(
            f"{name}: got {type(value).__name__} of shape {array.shape}, "
            f"expected an image or an array {wanted}"
        )
    return list(array) if array.ndim == single + 1 else [array]


def _to_pil(item: Any, mode: str) -> Image.Image:
    if isinstance(item, Image.Image):
        return item.convert(mode)
    if item.dtype == bool:
        item = item.astype(np.uint8) * np.uint8(255)
    elif mode == "L" and np.issubdtype(item.dtype, np.floating):
        item = np.round(np.clip(item, 0, 1) * 255).astype(np.uint8)
    if item.dtype != np.uint8:
        name = "mask" if mode == "L" else "image"
        raise InputError(f"{name}: got an array of {item.dtype}, expected uint8")
    return Image.fromarray(item)


def _array(pil: Image.Image, height: int, width: int) -> Float[NDArray, "h w *c"]:
    if pil.size != (width, height):
        how = Image.Resampling.NEAREST if pil.mode == "L" else Image.Resampling.LANCZOS
        pil = pil.resize((width, height), how)
    return np.asarray(pil, np.float32)


def downsample_mask(masks: Float[NDArray, "b h w 1"], cell: int) -> Float[NDArray, "b h2 w2 1"]:
    """Masks for latents: the first pixel of every cell, as nearest-neighbour resizing takes it."""
    return masks[:, ::cell, ::cell]


def enlarge(
    latents: Float[NDArray, "b h w c"], height: int, width: int
) -> Float[NDArray, "b h2 w2 c"]:
    """Latents at another size, bilinear, for a second pass at high resolution."""
    rows: Sequence[NDArray] = [
        np.stack(
            [
                np.asarray(
                    Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR)
                )
                for channel in np.moveaxis(image, -1, 0)
            ],
            axis=-1,
        )
        for image in latents.astype(np.float32)
    ]
    return np.stack(rows)
