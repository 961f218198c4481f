"""Hugging Face datasets, from the Hub or from a folder; needs the package `datasets`."""

import importlib
import pathlib
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.data.sources import Record
from jaxdiff.data.sources.rows import TableColumns, image_bytes
from jaxdiff.data.sources.storage import fingerprint


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
        columns = TableColumns(image_key, caption_key if captions else None)
        columns.check(path, table.column_names)
        selected = table.select_columns(columns.names)
        # As stored: what is wrong with an image is found, and counted, when it is decoded here.
        self._table = selected.cast_column(image_key, package.Image(decode=False))
        self._columns = columns
        # The library's own fingerprint covers the files and what was done to them.
        self.fingerprint = fingerprint(path, split, table._fingerprint, *columns.names)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        return self._columns.record(self._table[int(index)])

    def head(self, index: int, size: int) -> bytes:
        """The whole image: a row is read at once."""
        del size
        return image_bytes(self._table[int(index)][self._columns.image])
