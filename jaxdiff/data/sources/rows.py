"""A row of a table as Hugging Face writes them: an image in one cell, a caption in another."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.data.bad_samples import BadSampleError
from jaxdiff.data.sources import Record
from jaxdiff.data.sources.captions import caption_of
from jaxdiff.data.sources.folder import NO_IMAGE
from jaxdiff.data.sources.storage import MISSING


class TableColumns:
    """The names of the two columns, `caption` None where captions are not asked for."""

    def __init__(self, image: str, caption: str | None) -> None:
        self.image, self.caption = image, caption
        self.names = [image] if caption is None else [image, caption]

    def check(self, path: str, found: list[str]) -> None:
        """InputError where one is missing."""
        for name in self.names:
            if name not in found:
                listed = ", ".join(found)
                raise InputError(f"{path}: got the columns {listed}, expected {name!r} among them")

    def record(self, row: Mapping[str, Any]) -> Record:
        """What a row says; of several captions the first counts. BadSampleError without one."""
        if self.caption is None:
            return {"image": image_bytes(row[self.image]), "caption": ""}
        caption = caption_of({self.caption: row[self.caption]}, self.caption)
        return {"image": image_bytes(row[self.image]), "caption": caption}


def image_bytes(value: Any) -> bytes:
    """The file in a cell, or the one that it names; BadSampleError if there is none."""
    if value is None:
        raise BadSampleError(NO_IMAGE)
    if isinstance(value, bytes):
        return value
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        return pathlib.Path(value["path"]).read_bytes()
    except (OSError, TypeError):
        raise BadSampleError(MISSING) from None
