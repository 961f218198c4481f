"""ArrayRecord files: random access to records, each a msgpack map of one captioned image.

writer = ArrayRecordWriter(path, "group_size:1")
writer.write(msgpack.packb({"image": file_bytes, "caption": text}))
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import msgpack
from array_record.python.array_record_module import ArrayRecordWriter

from jaxdiff.core.aliases import RECORDS, rename_keys
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.sources import Record
from jaxdiff.data.sources.captions import clean_caption
from jaxdiff.data.sources.storage import Storage, fingerprint

EXTENSION = ".array_record"
BROKEN_FILE, BROKEN_RECORD = "truncated or broken ArrayRecord file", "broken record"
OPTIONS = "group_size:1"  # each record is compressed alone, so that one read gives one record


def write_records(path: pathlib.Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write msgpack maps to a new ArrayRecord file, and say how many; all or nothing."""
    count = 0
    with atomic_file(path) as temporary:
        with _writing(path):
            writer = ArrayRecordWriter(str(temporary), OPTIONS)
        try:
            for record in records:
                with _writing(path):
                    writer.write(msgpack.packb(dict(record)))
                count += 1
        finally:
            with _writing(path):
                writer.close()
    return count


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """Turn the writer's "write() failed: No space left on device; ..." into a WriteError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).removeprefix("write() failed: ").partition(";")[0].lower()
        raise WriteError(f"{path}: got {reason}, expected a file to write") from None


def parse_record(data: bytes) -> dict[str, Any]:
    """The map in a record; BadSampleError if there is none."""
    try:
        record = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException):
        raise BadSampleError(BROKEN_RECORD) from None
    if not isinstance(record, dict):
        raise BadSampleError(BROKEN_RECORD)
    return record


class RecordFiles:
    """The records of several ArrayRecord files behind one another, as bytes."""

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self._source: Any = grain.sources.ArrayRecordDataSource([str(path) for path in paths])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        try:
            return self._source[index]
        except (RuntimeError, IndexError):
            raise BadSampleError(BROKEN_RECORD) from None


def is_readable(path: pathlib.Path) -> bool:
    """Whether an ArrayRecord file is whole enough to be opened."""
    try:
        grain.sources.ArrayRecordDataSource([str(path)])
    except RuntimeError:
        return False
    return True


class RecordSource:
    """The captioned images of all .array_record files below a local folder."""

    def __init__(self, path: str, skipped: BadSampleCounter, *, captions: bool = True) -> None:
        storage = Storage(path)
        files = {n: d for n, d in storage.find().items() if n.endswith(EXTENSION)}
        if not files:
            raise InputError(
                f"data.path: got {path} without {EXTENSION} files, expected at least one"
            )
        names = [name for name in files if is_readable(storage.local(name))]
        for name in sorted(files.keys() - names):
            skipped.seen()
            skipped.broken(BROKEN_FILE, where=f"{path}: {name}")
        if not names:
            raise InputError(
                f"data.path: got {path}, expected an {EXTENSION} file that is complete"
            )
        self._files = RecordFiles([storage.local(name) for name in names])
        self._captions = captions
        self.fingerprint = fingerprint(str(captions), *(f"{n} {files[n]['size']}" for n in names))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        record = rename_keys(parse_record(self._files[index]), RECORDS)
        image, caption = record.get("image"), record.get("caption", "")
        if not isinstance(image, bytes) or not isinstance(caption, str):
            raise BadSampleError(BROKEN_RECORD)
        return {"image": image, "caption": clean_caption(caption) if self._captions else ""}

    def head(self, index: int, size: int) -> bytes:
        """The whole image: a record is read at once."""
        del size
        image = rename_keys(parse_record(self._files[index]), RECORDS).get("image")
        return image if isinstance(image, bytes) else b""
