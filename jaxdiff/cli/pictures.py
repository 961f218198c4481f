"""PNG files that carry their settings, written whole or not at all."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError

BLOCK = "jaxdiff"


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The settings in the `parameters` text that A1111's web UI writes and most viewers read."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(
        f"Steps: {settings['steps']}, Sampler: {settings['sampler']}, "
        f"CFG scale: {settings['guidance_scale']:g}, Seed: {settings['seed']}, "
        f"Size: {settings['width']}x{settings['height']}, Model: {settings['model']}"
    )
    return "\n".join(lines)


def write(path: pathlib.Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write `image` and its settings to `path`: to a temporary name first, then renamed."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(settings))
    info.add_itxt(BLOCK, json.dumps(settings, sort_keys=True))
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


@functools.lru_cache(maxsize=4)
def read(name: str, path: pathlib.Path) -> Image.Image:
    """The picture at `path`, upright and in memory; InputError that begins with `name`."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).copy()
    except UnidentifiedImageError:
        raise InputError(f"{name}: got {path} (no picture), expected a picture") from None
    except OSError as error:
        why = error.strerror or "cut short"
        raise InputError(f"{name}: got {path} ({why}), expected a picture") from None


def digest(*paths: pathlib.Path) -> str:
    """A short text that files of other content do not have; "" where there are none."""
    found = [path for path in paths if path.is_file()]
    whole = hashlib.sha256()
    for path in found:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: whole)
    return whole.hexdigest()[:12] if found else ""


def settings_of(path: pathlib.Path) -> dict[str, Any] | None:
    """The settings stored in the PNG at `path`, or None if there is no such picture."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            settings = json.loads(image.info.get(BLOCK, "null"))
    except (UnidentifiedImageError, OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"output: got {path}, which is no picture of ours, expected a free name")
    return settings
