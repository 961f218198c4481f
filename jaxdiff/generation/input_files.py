"""Files that are read from the first byte to the last, local or wherever fsspec has a protocol."""

import contextlib
import gzip
import hashlib
import io
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from jaxdiff.core.errors import InputError, os_error_message
from jaxdiff.core.shutdown import SHUTDOWN_REQUESTED

BLOCK = 1 << 20  # bytes that are asked for at once
RETRY_SECONDS = 600.0  # seconds for which a storage may give no answer
FIRST, LONGEST = 0.5, 30.0  # seconds between tries: each time twice as many
COMPRESSED = ".gz"


def is_url(where: str | pathlib.Path) -> bool:
    """Whether `where` is a URL such as gs://bucket/file, not a local path."""
    return "://" in str(where)


def input_suffix(where: str | pathlib.Path) -> str:
    """The suffix that says what a file holds: that before .gz, in lower case."""
    name = str(where).rpartition("/")[2].lower().removesuffix(COMPRESSED)
    return pathlib.PurePath(name).suffix


@contextlib.contextmanager
def open_input(where: str | pathlib.Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, those of a .gz file unpacked; InputError if it cannot be opened."""
    with _open(where) as file:
        if not str(where).lower().endswith(COMPRESSED):
            yield file
            return
        packed: Any = gzip.GzipFile(fileobj=file)
        with io.BufferedReader(packed, BLOCK) as unpacked:
            yield unpacked


def _open(where: str | pathlib.Path) -> io.BufferedReader:
    try:
        if not is_url(where):
            return io.BufferedReader(io.FileIO(where), BLOCK)
        from fsspec.core import url_to_fs  # only now: most files are local

        fs, path = url_to_fs(str(where))
        return io.BufferedReader(_RetryingReader(fs.open(path, "rb"), str(where)), BLOCK)
    except Exception as error:  # each file system has errors of its own
        raise unreadable(where, error) from None


def content_identity(where: str | pathlib.Path) -> str:
    """What tells a file from others: a hash of its content, of a URL what the storage says of it.

    InputError if it cannot be read.
    """
    try:
        if not is_url(where):
            with pathlib.Path(where).open("rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
        from fsspec.core import url_to_fs  # only now: most files are local

        fs, path = url_to_fs(str(where))
        info = fs.info(path)
    except Exception as error:  # each file system has errors of its own
        raise unreadable(where, error) from None
    names = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created")
    return str([info.get(name) for name in names])


def unreadable(where: str | pathlib.Path, error: Exception) -> InputError:
    """The InputError for a prompt file that cannot be read (any more)."""
    reason = os_error_message(error) if isinstance(error, OSError) else str(error)
    return InputError(f"prompts: got {where} ({reason:.160}), expected a file to read")


class _RetryingReader(io.RawIOBase):
    """A file of a storage, each part of which is asked for again until the storage answers."""

    def __init__(self, file: Any, where: str) -> None:
        self._file, self._where = file, where

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        start, pause, position = time.monotonic(), FIRST, self._file.tell()
        while True:
            try:
                data = self._file.read(len(buffer))
                buffer[: len(data)] = data
                return len(data)
            except Exception as error:  # each file system has errors of its own
                passed = time.monotonic() - start
                if isinstance(error, FileNotFoundError) or passed > RETRY_SECONDS:
                    raise unreadable(self._where, error) from None
            if SHUTDOWN_REQUESTED.wait(pause):
                raise InputError(f"prompts: got no answer from {self._where}, expected its lines")
            self._file.seek(position)
            pause = min(2 * pause, LONGEST)
