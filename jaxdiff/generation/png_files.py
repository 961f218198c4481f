"""PNG files that carry their settings, written whole or not at all."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from PIL import Image

from jaxdiff.core.atomic import atomic_file
from jaxdiff.generation.image_files import png_info
from jaxdiff.generation.image_files import read_settings as read_settings


def write_png(path: pathlib.Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write `image` with its settings to `path`, whole or not at all."""
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=png_info(settings))


def file_digest(*paths: pathlib.Path) -> str:
    """A short hash of the content of those files that exist; "" if none does."""
    files = [path for path in paths if path.is_file()]
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: whole)
    return whole.hexdigest()[:12] if files else ""
