"""Files of a folder or a bucket: whatever fsspec has a protocol for (file, gs, s3, memory)."""

import hashlib
import pathlib
import posixpath
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from jaxdiff.core.errors import InputError
from jaxdiff.data.skipped import BrokenError

MISSING, UNREADABLE = "missing file", "unreadable file"


class Storage:
    """The files below `path`, a local folder or a URL such as gs://bucket/folder."""

    def __init__(self, path: str) -> None:
        self.path = path
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
        """Bytes `start` to `end` of a file, all by default; BrokenError if they cannot be had."""
        try:
            return self.fs.cat_file(self._full(name), start=start, end=end)
        except FileNotFoundError:
            raise BrokenError(MISSING) from None
        except Exception:  # each file system has errors of its own
            raise BrokenError(UNREADABLE) from None

    def text(self, name: str) -> str:
        """A file that the source cannot do without; InputError if it cannot be read."""
        try:
            return self.read(name).decode("utf-8")
        except (BrokenError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: {name}: got {error}, expected a text file") from None

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
