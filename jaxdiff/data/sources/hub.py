"""Hugging Face datasets, from the Hub or from a folder; needs the package `datasets`."""

import importlib
import pathlib
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.data.skipped import BrokenError
from jaxdiff.data.sources import Record
from jaxdiff.data.sources.folder import NO_CAPTION, told
from jaxdiff.data.sources.storage import MISSING, fingerprint


def _package() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            "data.kind: got hub without the package datasets, expected it: pip install datasets"
        ) from None


class HubSource:
    """The rows of a split of a dataset: a Hub name, or a folder that `save_to_disk` has written.

    `image_key` and `caption_key` name its columns; of several captions in a row the first counts.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        image_key: str = "image",
        caption_key: str = "text",
        captions: bool = True,
    ) -> None:
        package = _package()
        try:
            saved = (pathlib.Path(path) / "state.json").is_file() or (
                pathlib.Path(path) / "dataset_dict.json"
            ).is_file()
            data = package.load_from_disk(path) if saved else package.load_dataset(path)
            table = data[split] if isinstance(data, dict) else data
        except (OSError, ValueError, KeyError) as error:
            wanted = f"a dataset with the split {split!r}"
            raise InputError(f"data.path: got {path} ({error}), expected {wanted}") from None
        wanted = (image_key, caption_key) if captions else (image_key,)
        for name in wanted:
            if name not in table.column_names:
                listed = ", ".join(table.column_names)
                raise InputError(f"{path}: got the columns {listed}, expected {name!r} among them")
        kept = table.select_columns(list(wanted))
        # As stored: what is wrong with a picture is found, and counted, when it is decoded here.
        self._table = kept.cast_column(image_key, package.Image(decode=False))
        self._image, self._caption, self._captions = image_key, caption_key, captions
        # The library's own fingerprint covers the files and what was done to them.
        self.fingerprint = fingerprint(path, split, table._fingerprint, *wanted)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        row = self._table[int(index)]
        caption = row[self._caption] if self._captions else ""
        if isinstance(caption, list):
            caption = caption[0] if caption else None
        if not isinstance(caption, str):
            raise BrokenError(NO_CAPTION)
        picture = _bytes(row[self._image])
        return {"picture": picture, "caption": told(caption) if self._captions else ""}

    def head(self, index: int, size: int) -> bytes:
        """The whole picture: a row is read at once."""
        del size
        return _bytes(self._table[int(index)][self._image])


def _bytes(cell: Any) -> bytes:
    """The file behind an undecoded image cell."""
    if cell is None:
        raise BrokenError("without picture")
    if cell["bytes"] is not None:
        return cell["bytes"]
    try:
        return pathlib.Path(cell["path"]).read_bytes()
    except (OSError, TypeError):
        raise BrokenError(MISSING) from None
