"""Encoded images to pixels of a given size: turned upright, resized, cropped, flipped.

The size conditioning of SDXL (2307.01952, section 2.2) is recorded on the way: `time_ids` are the
original height and width, top and left of the crop in the resized (and flipped) image, and the
target height and width.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from jaxdiff.core.types import Int, NDArray, UInt8
from jaxdiff.data.bad_samples import BadSampleError

CROPS = ("centre", "random")
BROKEN_IMAGE, TOO_LONG = "broken image", "far too long and thin"
HEAD = 1 << 16  # bytes that nearly always tell an image's size
_ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held; 5 to 8 lie on their side
LONGEST = 16  # times the target's area: what would be cropped to less than that is not used
ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # other formats have previews or pages
_SHARPER = 2  # a JPEG is decoded at a fraction of its size, but at least so many times the target


class ImageSample(NamedTuple):
    """Pixels of the target size, and their SDXL time ids."""

    image: UInt8[NDArray, "h w 3"]
    time_ids: Int[NDArray, "6"]


class AugmentParams(NamedTuple):
    """The random parameters of crop and flip, each in [0, 1)."""

    top: float = 0.5
    left: float = 0.5
    flip: float = 1.0


def sample_augmentation(
    entropy: tuple[int, ...], *, crop: str = "centre", flip: bool = False
) -> AugmentParams:
    """The parameters from `entropy` (seed, epoch, position of the sample)."""
    top, left, mirrored = np.random.default_rng(entropy).random(3).tolist()
    return AugmentParams(
        top if crop == "random" else CENTRE.top,
        left if crop == "random" else CENTRE.left,
        mirrored if flip else CENTRE.flip,
    )


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded image held upright, from its beginning alone."""
    with _decoding(), Image.open(io.BytesIO(data)) as image:
        return _upright(image)


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turn whatever a decoder raises, fed with anything, into a BadSampleError."""
    try:
        yield
    except Exception:
        raise BadSampleError(BROKEN_IMAGE) from None


CENTRE = AugmentParams()


def resize_and_crop(
    data: bytes, size: tuple[int, int], augment: AugmentParams = CENTRE
) -> ImageSample:
    """The image scaled to just cover `size` (height, width), cropped as `augment` says.

    Its pixels are flipped left to right where `augment.flip` is below a half. BadSampleError if it
    cannot be decoded.
    """
    with _decoding():
        image = Image.open(io.BytesIO(data))
    with image:
        with _decoding():
            original = _upright(image)
        if not all(original):
            raise BadSampleError(BROKEN_IMAGE)
        cover = size_to_cover(original, size)
        if cover[0] * cover[1] > LONGEST * size[0] * size[1]:
            raise BadSampleError(TOO_LONG)
        # Of a JPEG only as many frequencies as needed; the side it lies on is not known yet.
        largest = _SHARPER * max(cover)
        with _decoding():
            image.draft("RGB", (largest, largest))
            pixels = to_rgb(ImageOps.exif_transpose(image) if _tagged(image) else image)
        animation = image.format if _is_animated(image) else None
    if animation is not None:
        warnings.warn(
            f"data: got animated {animation} images, of which the first frame is used", stacklevel=2
        )
    if augment.flip < 0.5:
        pixels = ImageOps.mirror(pixels)
    resized = pixels.resize((cover[1], cover[0]), Image.Resampling.LANCZOS)
    top, left = (
        int(u * (long - short + 1))
        for u, long, short in zip((augment.top, augment.left), cover, size, strict=True)
    )
    part = resized.crop((left, top, left + size[1], top + size[0]))
    return ImageSample(np.asarray(part), np.array([*original, top, left, *size], np.int32))


def size_to_cover(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of `original`'s shape that `size` fits into."""
    scale = max(target / length for target, length in zip(size, original, strict=True))
    height, width = (
        max(target, round(length * scale)) for target, length in zip(size, original, strict=True)
    )
    return height, width


def _upright(image: Image.Image) -> tuple[int, int]:
    """Height and width after turning; the pixels are not decoded."""
    turned = _tagged(image) and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    width, height = image.size
    return (width, height) if turned else (height, width)


def _tagged(image: Image.Image) -> bool:
    """Whether EXIF is to be asked: a PNG would decode everything in search of it."""
    return image.format != "PNG" or "exif" in image.info


def _is_animated(image: Image.Image) -> bool:
    """Whether there are more frames; False where the second one cannot be read."""
    try:
        return image.format in ANIMATIONS and bool(getattr(image, "is_animated", False))
    except Exception:  # a decoder fed with anything raises anything
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits; what is transparent becomes white."""
    if image.mode.startswith("I"):
        return to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """An image with 16 bits of grey in 8 bits, any other as it is."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
