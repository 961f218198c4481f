"""PNG files that carry their settings, written whole or not at all."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from jaxdiff.core.aliases import rename_settings
from jaxdiff.core.atomic import atomic_file
from jaxdiff.generation.parameters_text import parameters_text

METADATA_KEY = "jaxdiff"
END = b"\0\0\0\0IEND\xaeB`\x82"  # of every whole PNG file


def write_png(path: pathlib.Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write `image` with its settings to `path`, whole or not at all."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(settings))
    info.add_itxt(METADATA_KEY, json.dumps(settings, sort_keys=True))
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def file_digest(*paths: pathlib.Path) -> str:
    """A short hash of the content of those files that exist; "" if none does."""
    files = [path for path in paths if path.is_file()]
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: whole)
    return whole.hexdigest()[:12] if files else ""


def read_settings(path: pathlib.Path) -> dict[str, Any] | None:
    """The settings in the PNG at `path`, former names replaced; None if it has none or is cut."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            settings = json.loads(image.info.get(METADATA_KEY, "null"))
            file.seek(-len(END), os.SEEK_END)
            if file.read() != END:
                return None
    except (UnidentifiedImageError, OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        return None
    return rename_settings(settings, source=str(path))
