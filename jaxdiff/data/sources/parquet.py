"""Parquet files as Hugging Face stores datasets, read in place: nothing is downloaded as a whole.

The footer of each file is read once, to list its row groups; the lists are kept in a cache folder.
After that a row group is one read, of 100 rows or so, and stays in memory for a while. Needs the
package `pyarrow`.
"""

import importlib
import io
import pathlib
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Int, NDArray
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.sources import Record
from jaxdiff.data.sources.rows import TableColumns, image_bytes
from jaxdiff.data.sources.storage import Storage, fingerprint, version

READERS = 8  # files that are listed at the same time
MAGIC = b"PAR1"  # at the beginning and the end of a file
BROKEN = "truncated or broken Parquet file"
MAX_CACHED_BYTES = 2**30  # bytes of the row groups that are read from at the same time, about
SPLITS = ("train", "validation", "valid", "val", "test")


def _package() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            "data.kind: got parquet without the package pyarrow, expected it: pip install pyarrow"
        ) from None


class ParquetIndex(NamedTuple):
    """The row groups of a file, none of one that is broken."""

    rows: Int[NDArray, "n"]
    sizes: Int[NDArray, "n"]  # bytes in memory
    columns: list[str]


class ParquetSource:
    """The rows of all .parquet files below a folder that are of a split, in the order of the files.

    Where names of files or folders say of which split they are (train-00000-of-00010.parquet),
    those of another are left out. `cache` is a local folder. Implements BlockSource: rows of one
    group are to be read one soon after the other.
    """

    def __init__(
        self,
        path: str,
        skipped: BadSampleCounter,
        *,
        cache: pathlib.Path,
        split: str = "train",
        image_key: str = "image",
        caption_key: str = "text",
        captions: bool = True,
    ) -> None:
        self._package, self._storage = _package(), Storage(path)
        found = {n: d for n, d in self._storage.find().items() if n.endswith(".parquet")}
        names = _of_split(path, list(found), split)
        self._columns = TableColumns(image_key, caption_key if captions else None)

        def list_one(name: str) -> ParquetIndex:
            index_file = cache / f"{fingerprint(path, name, version(found[name]))}.npz"
            return self._listed(name, int(found[name]["size"]), index_file)

        with ThreadPoolExecutor(READERS) as pool:
            listed = dict(zip(names, pool.map(list_one, names), strict=True))
        for name, listing in listed.items():
            skipped.seen()
            if listing.columns:
                self._columns.check(f"{path}: {name}", listing.columns)
            else:
                skipped.broken(BROKEN, where=f"{path}: {name}")
        self._places = [(name, g) for name, one in listed.items() for g in range(len(one.rows))]
        rows = [count for one in listed.values() for count in one.rows.tolist()]
        self.block_starts = np.cumsum([0, *rows])
        largest = max((size for one in listed.values() for size in one.sizes.tolist()), default=1)
        self.max_open_blocks = int(np.clip(MAX_CACHED_BYTES // max(largest, 1), 1, 64))
        self._groups: dict[int, Future[Any]] = {}  # the newest last
        self._lock = threading.Lock()
        parts = (f"{name} {one.rows.tolist()} {one.sizes.tolist()}" for name, one in listed.items())
        self.fingerprint = fingerprint(*self._columns.names, *parts)

    def _listed(self, name: str, size: int, index_file: pathlib.Path) -> ParquetIndex:
        if index_file.exists():
            with np.load(index_file) as table:
                return ParquetIndex(table["rows"], table["sizes"], table["columns"].tolist())
        try:
            footer = self._footer(name, size)
        except (
            BadSampleError
        ) as error:  # not a fault of the file's, perhaps gone at the next attempt
            raise InputError(f"{name}: got {error}, expected a file to read") from None
        try:
            metadata = self._package.read_metadata(io.BytesIO(MAGIC + footer))
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            columns = list(metadata.schema.to_arrow_schema().names)
        except (ValueError, OSError):  # both are said of damaged bytes
            groups, columns = [], []
        rows = np.array([group.num_rows for group in groups], np.int64)
        sizes = np.array([group.total_byte_size for group in groups], np.int64)
        names = np.array(columns, np.str_)
        with atomic_file(index_file) as temporary, temporary.open("wb") as file:
            np.savez(file, rows=rows, sizes=sizes, columns=names)
        return ParquetIndex(rows, sizes, columns)

    def _footer(self, name: str, size: int) -> bytes:
        """The end of a file: its description, its length in 4 bytes, and MAGIC."""
        end = len(MAGIC) + 4
        length = int.from_bytes(self._storage.read(name, max(size - end, 0), size)[:4], "little")
        return self._storage.read(name, max(size - end - length, 0), size)

    def __len__(self) -> int:
        return int(self.block_starts[-1])

    def __getitem__(self, index: int) -> Record:
        return self._columns.record(self._row(index))

    def head(self, index: int, size: int) -> bytes:
        """The whole image: a row is read at once."""
        del size
        return image_bytes(self._row(index)[self._columns.image])

    def _row(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.block_starts, index, side="right")) - 1
        (row,) = self._group(number).slice(int(index - self.block_starts[number]), 1).to_pylist()
        return row

    def _group(self, number: int) -> Any:
        """A row group, read by the first thread that asks for it and kept while it is new."""
        with self._lock:
            future = self._groups.pop(number, None)
            mine = future is None
            future = future or Future()
            self._groups[number] = future
            for old in list(self._groups)[: -2 * self.max_open_blocks]:
                del self._groups[old]
        if mine:
            try:
                future.set_result(self._read(*self._places[number]))
            except Exception as error:  # told to all that wait for it
                if str(error) != BROKEN:  # perhaps gone at the next attempt
                    with self._lock:
                        self._groups.pop(number, None)
                future.set_exception(error)
        return future.result()

    def _read(self, name: str, group: int) -> Any:
        def read() -> Any:
            with self._storage.open(name) as file:
                table = self._package.ParquetFile(file, pre_buffer=True)
                return table.read_row_group(group, columns=self._columns.names)

        return self._storage.retry(read, BROKEN)  # of what was read, or of reading it


def _of_split(path: str, names: list[str], split: str) -> list[str]:
    """The files of a split; InputError if there are none."""

    def of(split: str) -> list[str]:
        word = re.compile(rf"(?:^|[/_-]){re.escape(split)}(?:[/._-]|$)")
        return [name for name in names if word.search(name)]

    selected = of(split)
    if not selected and not any(map(of, SPLITS)):
        selected = names
    if not selected:
        raise InputError(f"data.path: got {path}, expected .parquet files of the split {split!r}")
    return selected
