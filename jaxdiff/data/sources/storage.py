"""Files of a folder or a bucket: whatever fsspec has a protocol for (file, gs, s3, memory)."""

import hashlib
import pathlib
import posixpath
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from jaxdiff.core.errors import InputError
from jaxdiff.core.shutdown import SHUTDOWN_REQUESTED
from jaxdiff.core.text import decode_text
from jaxdiff.data.bad_samples import BadSampleError

MISSING, UNREADABLE = "missing file", "unreadable file"
RETRY_SECONDS = 600.0  # seconds for which a storage may give no answer
TRIES = 3  # of a file, before it is asked whether the storage answers at all
FIRST, LONGEST = 0.5, 30.0  # seconds between them: each time twice as many

T = TypeVar("T")


class Storage:
    """The files below `path`, a local folder or a URL such as gs://bucket/folder."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._answered: str | None = None  # a file that was read
        try:
            self.fs, self.root = url_to_fs(path)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"data.path: got {path} ({error}), expected a folder or a URL that fsspec opens"
            ) from None

    def find(self) -> dict[str, dict[str, Any]]:
        """What is known of each file (its "size" at least), by path below the folder, sorted."""
        try:
            found = self.fs.find(self.root, detail=True) if self.fs.isdir(self.root) else {}
        except Exception as error:  # each file system has errors of its own
            raise InputError(f"data.path: got {self.path} ({error}), expected a folder") from None
        if not found:
            raise InputError(f"data.path: got {self.path}, expected a folder with files")
        root = self.root.rstrip("/")
        return {
            posixpath.relpath(name, root): found[name]
            for name in sorted(found)
            if not posixpath.basename(name).startswith(".")
        }

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file, by default all; BadSampleError if unreadable."""
        data = self.retry(lambda: self.fs.cat_file(self._full(name), start=start, end=end))
        self._answered = name
        return data

    def retry(self, read: Callable[[], T], broken: str = UNREADABLE) -> T:
        """What `read` returns; it is called again where it raises, until the storage answers.

        A file that cannot be read where others can is a BadSampleError that says `broken`. A
        storage without an answer for RETRY_SECONDS, or while the process shuts down, is an
        InputError: no item is skipped for it.
        """
        start, tries, pause = time.monotonic(), 0, FIRST
        while True:
            try:
                return read()
            except (BadSampleError, InputError):
                raise
            except FileNotFoundError:
                raise BadSampleError(MISSING) from None
            except Exception as error:  # each file system has errors of its own
                tries, passed = tries + 1, time.monotonic() - start
                if tries >= TRIES and self._is_available():
                    raise BadSampleError(broken) from None
                why = next(iter(str(error).splitlines()), type(error).__name__)[:160]
                problem = f"data.path: got no answer from {self.path} ({why})"
                if passed > RETRY_SECONDS or (tries >= TRIES and SHUTDOWN_REQUESTED.is_set()):
                    raise InputError(f"{problem} for {passed:.0f} s, expected its files") from None
                if tries == TRIES:
                    warnings.warn(f"{problem}, retrying", stacklevel=2)
            SHUTDOWN_REQUESTED.wait(pause)
            pause = min(2 * pause, LONGEST)

    def _is_available(self) -> bool:
        """Whether a byte can be read of the file that was read last, or the folder is there."""
        try:
            if self._answered is not None:
                self.fs.cat_file(self._full(self._answered), start=0, end=1)
                return True
            self.fs.invalidate_cache()
            return self.fs.isdir(self.root)
        except Exception:  # each file system has errors of its own
            return False

    def text(self, name: str) -> str:
        """A file that the source cannot do without; InputError if it cannot be read."""
        try:
            data = self.read(name)
        except BadSampleError as error:
            raise InputError(f"{self.path}: {name}: got {error}, expected a text file") from None
        return decode_text(data, f"{self.path}: {name}")

    def open(self, name: str) -> Any:
        """A file for sequential reading; OSError if it cannot be opened."""
        try:
            return self.fs.open(self._full(name), "rb")
        except OSError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise OSError(str(error)) from None

    def local(self, name: str) -> pathlib.Path:
        """The path of a file for readers that know the local file system only."""
        if not isinstance(self.fs, fsspec.get_filesystem_class("file")):
            raise InputError(
                f"data.path: got {self.path}, expected a local (or mounted) folder for ArrayRecord"
            )
        return pathlib.Path(self._full(name))

    def _full(self, name: str) -> str:
        return posixpath.join(self.root, name)


def version(details: dict[str, Any]) -> str:
    """What changes when a file is written anew, as far as its storage says."""
    marks = (
        "size",
        "mtime",
        "created",
        "etag",
        "ETag",
        "md5Hash",
        "LastModified",
        "generation",
        "blob_id",
    )
    # The local file system's "created" also changes with a rename; its mtime says enough.
    known = [(m, str(details[m])) for m in marks if m in details]
    if "mtime" in details:
        known = [pair for pair in known if pair[0] != "created"]
    return repr(known)


def fingerprint(*parts: str) -> str:
    """A short name for `parts`."""
    joined = "\0".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(joined).hexdigest()[:16]
