"""Images and masks as they are given: PIL images, files or arrays, and what arrays they become."""

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.data.preprocessing import to_8_bits, to_rgb

ImageInput = Any  # a PIL image, a file's path, an array, or a sequence of them


class ImageFileError(InputError):
    """A file that is no image, or that cannot be read."""


@functools.lru_cache(maxsize=4)
def read_image(name: str, path: pathlib.Path) -> Image.Image:
    """The image at `path`, upright; the InputError for any other file begins with `name`."""
    with file_errors(name, path), Image.open(path) as image:
        return ImageOps.exif_transpose(image).copy()


@contextlib.contextmanager
def file_errors(name: str, path: pathlib.Path) -> Iterator[None]:
    """An InputError that begins with `name` for a file that is no whole image."""
    try:
        yield
    except UnidentifiedImageError:
        reason = "not an image"
    except Image.DecompressionBombError:
        reason = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    except (OSError, SyntaxError, ValueError) as error:  # of damaged chunks of a PNG
        reason = getattr(error, "strerror", None) or "truncated"
    else:
        return
    raise ImageFileError(f"{name}: got {path} ({reason}), expected an image file")


def image_size(image: ImageInput, downscale: int) -> tuple[int, int]:
    """Height and width in pixels of an image or of latents."""
    if isinstance(image, pathlib.Path):
        image = read_image("image", image)
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width = image.shape[:2]
    return (height, width) if image.dtype == np.uint8 else (downscale * height, downscale * width)


def are_latents(image: ImageInput, channels: int) -> bool:
    """Whether `image` is floating point with as many channels as latents have."""
    return (
        not isinstance(image, list | tuple | str | pathlib.PurePath | Image.Image | None)
        and np.ndim(image) in (3, 4)
        and np.shape(image)[-1] == channels
        and np.issubdtype(np.asarray(image).dtype, np.floating)
    )


def image_list(value: ImageInput, name: str, channels: int | None) -> list[Any]:
    """The images of a value as a list."""
    if isinstance(value, Image.Image):
        return [value]
    if isinstance(value, str | pathlib.PurePath):
        return [pathlib.Path(value)]
    if isinstance(value, list | tuple):
        return [item for part in value for item in image_list(part, name, channels)]
    array = np.asarray(value)
    single = 2 if channels is None else 3
    right = channels is None or array.shape[-1:] == (channels,)
    if array.dtype == object or array.ndim not in (single, single + 1) or not right:
        wanted = "(b, h, w)" if channels is None else f"(b, h, w, {channels})"
        raise InputError(
            f"{name}: got {type(value).__name__} of shape {array.shape}, "
            f"expected an image or an array {wanted}"
        )
    if channels is not None and array.dtype != np.uint8:
        raise InputError(f"{name}: got an array of {array.dtype}, expected uint8")
    return list(array) if array.ndim == single + 1 else [array]


MAX_VALUE = 4.0  # of images that a network has generated, whose values are about [-1, 1]


def low_resolution_list(value: ImageInput) -> list[Any]:
    """The images to enlarge as a list; floating-point ones have values in [-1, 1]."""
    if not are_latents(value, 3):
        return image_list(value, "image", 3)
    rows = np.asarray(value, np.float32)
    if not np.isfinite(rows).all():
        raise InputError("image: got numbers that are not finite, expected an image")
    if np.abs(rows).max(initial=0) > MAX_VALUE:
        raise InputError(f"image: got floats up to {rows.max():g}, expected them in [-1, 1]")
    return list(rows.reshape(-1, *rows.shape[-3:]))


def low_resolution_array(images: Sequence[Any]) -> Float[NDArray, "b h w 3"]:
    """Images of one size, such as of `low_resolution_list`, in [-1, 1] unless floats go beyond."""
    rows = [
        image
        if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating)
        else np.asarray(to_pil(image, "RGB"), np.float32) / 127.5 - 1
        for image in images
    ]
    return np.stack(rows)


def image_array(image: ImageInput, height: int, width: int) -> Float[NDArray, "b h w 3"]:
    """Pictures in [-1, 1], resized where they have another size.

    Arrays are uint8, (h, w, 3) or (b, h, w, 3). Raises InputError.
    """
    rows = [to_pil(item, "RGB") for item in image_list(image, "image", 3)]
    return np.stack([_array(row, height, width) for row in rows]) / 127.5 - 1


def mask_array(mask: ImageInput, height: int, width: int) -> Float[NDArray, "b h w 1"]:
    """1 where the mask is at least half white, which is where the image is repainted, else 0.

    Masks of another size are resized, then cut at one half, as diffusers does.

    Arrays are bool, or uint8, or floating point in [0, 1]; (h, w) or (b, h, w). Raises InputError.
    """
    rows = [to_pil(item, "L") for item in image_list(mask, "mask", None)]
    grey = np.stack([_array(row, height, width) for row in rows])
    return (grey >= 127.5).astype(np.float32)[..., None]


def to_pil(item: Any, mode: str, name: str | None = None) -> Image.Image:
    """A PIL image of `mode`, "RGB" or "L", of an image, an array or a file.

    InputError, which begins with `name`, for others; None: "image", or "mask" of "L".
    """
    name = name or ("mask" if mode == "L" else "image")
    if isinstance(item, pathlib.Path):
        item = read_image(name, item)
    if isinstance(item, Image.Image):
        return to_rgb(item) if mode == "RGB" else _grey(item)
    if item.dtype == bool:
        item = item.astype(np.uint8) * np.uint8(255)
    elif mode == "L" and np.issubdtype(item.dtype, np.floating):
        item = np.round(np.clip(item, 0, 1) * 255).astype(np.uint8)
    if item.dtype != np.uint8:
        raise InputError(f"{name}: got an array of {item.dtype}, expected uint8")
    return Image.fromarray(item)


def _grey(mask: Image.Image) -> Image.Image:
    """A mask in 8 bits of grey; InputError for one with transparent parts."""
    if mask.has_transparency_data and np.any(np.asarray(mask.convert("RGBA"))[..., 3] < 255):
        raise InputError(
            "mask: got an image with transparent parts, expected white where it is repainted and "
            "black elsewhere"
        )
    return to_8_bits(mask).convert("L")


def _array(pil: Image.Image, height: int, width: int) -> Float[NDArray, "h w *c"]:
    if pil.size != (width, height):
        pil = pil.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(pil, np.float32)
