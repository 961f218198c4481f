"""Images that clients send, as base64 or uploads, and those that they get."""

import base64
import binascii
import io
import re
import zlib
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray

READ = ("PNG", "JPEG", "WEBP")  # formats of images that clients send
OutputFormat = Literal["png", "jpeg", "webp"]
DEFAULT_QUALITY = 95  # of JPEG and WebP
_DATA_URL = re.compile(r"data:image/[\w.+-]{1,20};base64,", flags=re.ASCII)


def open_image(name: str, data: bytes, max_pixels: int) -> Image.Image:
    """The image in `data`, not decoded yet; InputError for other formats and for too many pixels.

    Sizes are read from the header, so that small files with large images cost nothing.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=READ)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, "too many", max_pixels) from None
    except _BROKEN:
        raise InputError(f"{name}: got no image, expected a PNG, JPEG or WebP file") from None
    if image.width * image.height > max_pixels:
        raise _too_large(name, f"{image.width}x{image.height}", max_pixels)
    return image


def decode_image(name: str, data: bytes, max_pixels: int) -> Image.Image:
    """The image in `data`, upright, in RGB or with its transparency; raises InputError."""
    image = open_image(name, data, max_pixels)
    try:
        upright = ImageOps.exif_transpose(image)
        upright.load()
        return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except _BROKEN:
        raise InputError(f"{name}: got a damaged image, expected a whole file") from None


_BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, zlib.error),
    *(OverflowError, MemoryError, AttributeError, NotImplementedError, RuntimeError),
)  # what PIL raises for broken files


def _too_large(name: str, got: str, max_pixels: int) -> InputError:
    return InputError(f"{name}: got an image of {got} pixels, expected at most {max_pixels}")


def decode_base64(name: str, text: str) -> bytes:
    """The bytes of base64, with or without a data URL's prefix; InputError for anything else.

    So a path or an address is an error, and nothing is ever opened or fetched.
    """
    match = _DATA_URL.match(text)
    try:
        return base64.b64decode(text[match.end() if match else 0 :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError):
        raise InputError(f"{name}: got no base64, expected an image in base64") from None


def image_from_base64(name: str, text: str, max_pixels: int) -> Image.Image:
    """The image in base64; raises InputError."""
    return decode_image(name, decode_base64(name, text), max_pixels)


def opaque(image: Image.Image) -> Image.Image:
    """The image in RGB without its transparency, colours of transparent parts included."""
    return image.convert("RGB")


def mask_from_alpha(image: Image.Image) -> Image.Image | None:
    """White where an image is transparent, which is what OpenAI's API edits; None without such."""
    if image.mode != "RGBA":
        return None
    alpha = np.asarray(image)[..., 3]
    if alpha.min() >= 128:
        return None
    return Image.fromarray(np.where(alpha < 128, 255, 0).astype(np.uint8))


def encode_image(
    pixels: NDArray,
    output_format: OutputFormat,
    quality: int | None = None,
    texts: dict[str, str] | None = None,
) -> bytes:
    """A file of uint8 pixels; `texts` are stored in a PNG, `quality` is 0 to 100 of the others."""
    buffer, options = io.BytesIO(), dict[str, Any]()
    if output_format == "png":
        info = PngInfo()
        for key, text in (texts or {}).items():
            info.add_itxt(key, text)
        options = {"pnginfo": info}
    else:
        options = {"quality": DEFAULT_QUALITY if quality is None else quality}
    Image.fromarray(pixels).save(buffer, format=output_format.upper(), **options)
    return buffer.getvalue()


def to_base64(data: bytes) -> str:
    """The bytes as base64."""
    return base64.b64encode(data).decode("ascii")
