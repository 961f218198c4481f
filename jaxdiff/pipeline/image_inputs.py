"""Images, masks, latents and noise that a call begins with: by request, and as arrays."""

import contextlib
import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.core.validate import check_shape
from jaxdiff.data.preprocessing import to_8_bits, to_rgb
from jaxdiff.pipeline.request import Request, Requests

ImageInput = Any  # a PIL image, a file's path, an array, or a sequence of them
STRENGTH = 0.8  # default for an initial image, as in diffusers; 1 with a mask


class ImageFileError(InputError):
    """A file that is no image, or that cannot be read."""


class InitialImages(NamedTuple):
    """What the images of a batch begin with; None: it is not given."""

    images: Float[NDArray, "b h2 w2 3"] | None = None  # in [-1, 1]
    latents: Float[NDArray, "b h w c"] | None = None  # scaled, instead of images
    masks: Float[NDArray, "b h2 w2 1"] | None = None  # 1 where the image is repainted
    noise: Float[NDArray, "b h w c"] | None = None  # of unit variance, instead of the seeds'


@functools.lru_cache(maxsize=4)
def read_image(name: str, path: pathlib.Path) -> Image.Image:
    """The image at `path`, upright; the InputError for any other file begins with `name`."""
    with _file_errors(name, path), Image.open(path) as image:
        return ImageOps.exif_transpose(image).copy()


@contextlib.contextmanager
def _file_errors(name: str, path: pathlib.Path) -> Iterator[None]:
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


def by_request(
    image: ImageInput, mask: ImageInput, latent_channels: int
) -> dict[str, list[ImageInput]]:
    """The image and the mask of each request, where there are any; one entry serves all.

    A floating-point array with `latent_channels` channels is latents. InputError for what is no
    image and for files that are none.
    """
    columns = {}
    if are_latents(image, latent_channels):
        rows = np.asarray(image, np.float32)
        if not np.isfinite(rows).all():
            raise InputError("image: got latents that are not finite, expected numbers")
        columns["image"] = list(rows.reshape(-1, *rows.shape[-3:]))
    elif image is not None:
        columns["image"] = _items(image, "image", 3)
    if mask is not None:
        columns["mask"] = _items(mask, "mask", None)
    for name, items in columns.items():
        if not items:
            raise InputError(f"{name}: got an empty list, expected an image")
        for path in {item for item in items if isinstance(item, pathlib.Path)}:
            with _file_errors(name, path), Image.open(path) as opened:
                opened.verify()
    return columns


def with_image_defaults(
    options: Mapping[str, Any],
    images: Mapping[str, Sequence[ImageInput]],
    downscale: int,
    multiple: int,
    strength: float = STRENGTH,
) -> dict[str, Any]:
    """`options` with the defaults for size and strength that initial images bring with them.

    `downscale` is how many pixels wide a latent is; sizes are multiples of `multiple`.
    `strength` is the default without a mask; with one it is 1.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "image" not in images:
        return given
    sides = dict(zip(("height", "width"), _size(images["image"][0], downscale), strict=True))
    unset = {name: side for name, side in sides.items() if name not in given}
    defaults: dict[str, Any] = {**_nearest_sides(unset, multiple)}
    if "denoising_start" not in given:
        defaults["strength"] = strength if "mask" not in images else 1.0
        if isinstance(chosen := given.get("strength"), list | tuple):
            filled = [defaults["strength"] if value is None else value for value in chosen]
            given["strength"] = filled
    return defaults | given


def _nearest_sides(sides: Mapping[str, int], multiple: int) -> dict[str, int]:
    """The nearest sides that are multiples; warns where an image is resized to them."""
    nearest = {name: max(round(n / multiple), 1) * multiple for name, n in sides.items()}
    if nearest != sides:
        changes = [f"{name} {n} to {nearest[name]}" for name, n in sides.items()]
        warnings.warn(
            f"image: resized from {', '.join(changes)}, multiples of {multiple}", stacklevel=2
        )
    return nearest


def _size(image: ImageInput, downscale: int) -> tuple[int, int]:
    """Height and width in pixels of an image or of latents."""
    if isinstance(image, pathlib.Path):
        image = read_image("image", image)
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width = image.shape[:2]
    return (height, width) if image.dtype == np.uint8 else (downscale * height, downscale * width)


def with_noise(requests: Requests, noise: Any, latent_shape: tuple[int, int, int]) -> Requests:
    """Requests with unit-variance noise of their own; InputError for another shape, or NaN."""
    rows = np.asarray(check_shape("latents", noise, (len(requests), *latent_shape)), np.float32)
    if not np.isfinite(rows).all():
        raise InputError("latents: got numbers that are not finite, expected noise")
    pairs = zip(requests, rows, strict=True)
    return Requests(dataclasses.replace(request, noise=row) for request, row in pairs)


def initial_images(
    requests: Sequence[Request], latent_shape: tuple[int, int, int]
) -> InitialImages:
    """The arrays of requests with one batch key; InputError for images that do not fit."""
    first, height, width = requests[0], requests[0].height, requests[0].width
    images = latents = masks = noise = None
    if first.begins_with_latents:
        rows = np.stack([request.image for request in requests])
        latents = check_shape("image", rows, (None, *latent_shape))
    elif first.image is not None:
        images = image_array([request.image for request in requests], height, width)
    if first.mask is not None:
        masks = mask_array([request.mask for request in requests], height, width)
    if first.noise is not None:
        noise = np.stack([np.asarray(request.noise) for request in requests])
    return InitialImages(images, latents, masks, noise)


def are_latents(image: ImageInput, channels: int) -> bool:
    """Whether `image` is floating point with as many channels as latents have."""
    return (
        not isinstance(image, list | tuple | str | pathlib.PurePath | Image.Image | None)
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


def mask_array(mask: ImageInput, height: int, width: int) -> Float[NDArray, "b h w 1"]:
    """1 where the mask is at least half white, which is where the image is repainted, else 0.

    Masks of another size are resized, then cut at one half, as diffusers does.

    Arrays are bool, or uint8, or floating point in [0, 1]; (h, w) or (b, h, w). Raises InputError.
    """
    rows = [_to_pil(item, "L") for item in _items(mask, "mask", None)]
    grey = np.stack([_array(row, height, width) for row in rows])
    return (grey >= 127.5).astype(np.float32)[..., None]


def _items(value: ImageInput, name: str, channels: int | None) -> list[Any]:
    """The images of a value as a list."""
    if isinstance(value, Image.Image):
        return [value]
    if isinstance(value, str | pathlib.PurePath):
        return [pathlib.Path(value)]
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
    if channels is not None and array.dtype != np.uint8:
        raise InputError(f"{name}: got an array of {array.dtype}, expected uint8")
    return list(array) if array.ndim == single + 1 else [array]


def _to_pil(item: Any, mode: str) -> Image.Image:
    name = "mask" if mode == "L" else "image"
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


def downsample_mask(
    masks: Float[NDArray, "b h w 1"], downscale: int
) -> Float[NDArray, "b h2 w2 1"]:
    """Masks for latents: the first pixel of every block, as nearest-neighbour resizing takes it."""
    return masks[:, ::downscale, ::downscale]


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
