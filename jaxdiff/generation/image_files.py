"""Files of images and latents, which carry their settings.

| format  | file           | the settings as JSON               | A1111's text           |
| ------- | -------------- | ---------------------------------- | ---------------------- |
| png     | .png           | the text chunk `jaxdiff`           | the chunk `parameters` |
| webp    | .webp          | EXIF's ImageDescription, see below | EXIF's UserComment     |
| jpeg    | .jpg           | EXIF's ImageDescription, see below | EXIF's UserComment     |
| latents | .safetensors   | the metadata `jaxdiff`             |                        |

In EXIF the JSON follows `jaxdiff:`. Latents are a tensor "latents" of shape (h, w, c) or (n, c).
"""

import io
import json
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from jaxdiff.core.aliases import rename_settings
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.generation.parameters_text import parameters_text

METADATA_KEY = "jaxdiff"
SUFFIXES: Mapping[str, str] = {
    "png": ".png",
    "webp": ".webp",
    "jpeg": ".jpg",
    "latents": ".safetensors",
}
QUALITIES: Mapping[str, int] = {"webp": 90, "jpeg": 95}  # by default
DESCRIPTION, EXIF, COMMENT = 0x010E, 0x8769, 0x9286  # tags of EXIF
UNICODE = b"UNICODE\0"  # the encoding of a UserComment: UTF-16, big endian here
MAX_EXIF = 65_000  # bytes in a JPEG file
PNG_END, JPEG_END = b"\0\0\0\0IEND\xaeB`\x82", b"\xff\xd9"  # of every whole file
LATENTS = "latents"
DAMAGED = (  # what is said of files that are none of ours
    *(UnidentifiedImageError, OSError, ValueError, SyntaxError, struct.error),
    *(TypeError, KeyError, AttributeError),
)


def check_format(image_format: str, quality: int | None = None) -> None:
    """InputError for a format that is none of SUFFIXES, or a quality that it does not have."""
    one_of("image_format", image_format, SUFFIXES)
    if quality is not None:
        in_range("quality", quality, 0, 100)
        if image_format not in QUALITIES:
            listed = " or ".join(QUALITIES)
            raise InputError(f"quality: got {quality} for {image_format}, expected {listed}")


def encode(
    image: Any, settings: Mapping[str, Any], image_format: str = "png", quality: int | None = None
) -> bytes:
    """The content of a file with `image` and its settings.

    `image` is a PIL image or a uint8 array (h, w, 3); for latents an array of floating point.
    `quality` is 0 to 100 (None: QUALITIES). InputError for settings that are too long for JPEG.
    """
    if image_format == LATENTS:
        return _encode_latents(np.asarray(image), settings)
    pil = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    if image_format == "png":
        pil.save(buffer, format="PNG", pnginfo=png_info(settings))
        return buffer.getvalue()
    quality = QUALITIES[image_format] if quality is None else quality
    exif = _exif(settings)
    if image_format == "jpeg" and len(exif) > MAX_EXIF:
        raise InputError(
            f"image_format: got settings of {len(exif)} bytes, expected at most {MAX_EXIF} in a "
            "JPEG file; PNG and WebP have no limit"
        )
    # At the qualities that people ask for, colours are as sharp as the rest.
    more = {"subsampling": 0} if image_format == "jpeg" and quality >= 90 else {}
    pil.save(buffer, format=image_format.upper(), quality=quality, exif=exif, **more)
    return buffer.getvalue()


def png_info(settings: Mapping[str, Any]) -> PngInfo:
    """The text chunks of a PNG file with these settings."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(settings))
    info.add_itxt(METADATA_KEY, json.dumps(settings, sort_keys=True))
    return info


def _exif(settings: Mapping[str, Any]) -> bytes:
    exif = Image.Exif()
    exif[DESCRIPTION] = f"{METADATA_KEY}:{json.dumps(settings, sort_keys=True)}"  # in ASCII
    text = parameters_text(settings).encode("utf-16-be", "surrogatepass")
    exif.get_ifd(EXIF)[COMMENT] = UNICODE + text
    return exif.tobytes()


def _encode_latents(latents: np.ndarray, settings: Mapping[str, Any]) -> bytes:
    from safetensors.numpy import save  # only now: most images are no latents

    metadata = {METADATA_KEY: json.dumps(settings, sort_keys=True)}
    return save({LATENTS: np.ascontiguousarray(latents)}, metadata)


def read_settings(path: pathlib.Path) -> dict[str, Any] | None:
    """The settings in the file at `path`, former names replaced; None if it has none or is cut."""
    try:
        with path.open("rb") as file:
            return settings_in(file, source=str(path))
    except OSError:
        return None


def settings_in(file: Any, *, source: str) -> dict[str, Any] | None:
    """The settings in an opened file, which InputErrors call `source`; see `read_settings`."""
    try:
        text = _latents_text(file)
        settings = json.loads(_image_text(file) if text is None else text)
    except DAMAGED:
        return None
    return rename_settings(settings, source=source) if isinstance(settings, dict) else None


def _image_text(file: Any) -> str:
    """The settings of a whole image as JSON; "null" for another one."""
    file.seek(0)
    with Image.open(file) as image:
        image_format = image.format
        if image_format == "PNG":
            text = image.info.get(METADATA_KEY)
        else:
            prefix, separator, found = str(image.getexif().get(DESCRIPTION, "")).partition(":")
            text = found if separator and prefix == METADATA_KEY else None
        return text if isinstance(text, str) and _is_whole(file, image_format) else "null"


def _is_whole(file: Any, image_format: str | None) -> bool:
    """Whether the file ends where its format says."""
    size = file.seek(0, os.SEEK_END)
    if image_format == "WEBP":
        file.seek(4)
        return size >= 8 + int.from_bytes(file.read(4), "little")
    end = PNG_END if image_format == "PNG" else JPEG_END
    file.seek(-min(len(end), size), os.SEEK_END)
    return file.read() == end


def _latents_text(file: Any) -> str | None:
    """The settings of whole latents as JSON, "null" without any; None for another file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if head[8:] != b"{" or length > size - 8:
        return None
    file.seek(8)
    header = json.loads(file.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name == LATENTS))
    if size != 8 + length + end:
        return "null"
    return header.get("__metadata__", {}).get(METADATA_KEY, "null")
