"""Where a job writes: a local folder, or one of a storage that fsspec has a protocol for.

Files appear whole, under their names. Names are relative to the folder, with "/" in them.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from jaxdiff.core.atomic import os_errors_as_write_error
from jaxdiff.core.errors import InputError, WriteError, os_error_message
from jaxdiff.core.shutdown import SHUTDOWN_REQUESTED
from jaxdiff.generation.input_files import is_url

RETRY_SECONDS = 600.0  # seconds for which a storage may give no answer
FIRST, LONGEST = 0.5, 30.0  # seconds between tries: each time twice as many

T = TypeVar("T")


class LocalPlace:
    """A local folder. What is written is on the disk once `sync` has returned."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self._scratch: pathlib.Path | None = None
        if root.exists() and not root.is_dir():
            raise InputError(f"output: got {root}, which is a file, expected a folder")

    def __str__(self) -> str:
        return str(self.root)

    def show(self, name: str) -> str:
        """The path of a file, for messages."""
        return str(self.root / name)

    def use_scratch(self, name: str) -> pathlib.Path:
        """An empty folder, of this process alone, for files that are not complete yet."""
        self._scratch = self.root / name
        with os_errors_as_write_error(self._scratch, "a folder to write to"):
            if self._scratch.exists():
                shutil.rmtree(self._scratch)
            self._make(self._scratch)
        return self._scratch

    def remove_scratch(self) -> None:
        """Remove the folder of `use_scratch`."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def write(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Write a file; without `replace` False if there is one, which stays as it is."""
        with os_errors_as_write_error(self.root / name):
            temporary = self._temporary(self.root / name)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                return self._place(temporary, name, replace=replace)
            finally:
                temporary.unlink(missing_ok=True)

    def publish(self, name: str, file: pathlib.Path, *, replace: bool) -> bool:
        """Move a complete `file` from the scratch folder here; see `write`."""
        with os_errors_as_write_error(self.root / name):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            return self._place(file, name, replace=replace)

    def _place(self, file: pathlib.Path, name: str, *, replace: bool) -> bool:
        target = self.root / name
        self._make(target.parent)
        if replace:
            file.replace(target)
            return True
        try:
            os.link(file, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if target.exists():
                return False
            file.replace(target)
            return True
        file.unlink()
        return True

    def _temporary(self, target: pathlib.Path) -> pathlib.Path:
        folder = self._scratch or target.parent
        self._make(folder)
        return folder / f".{target.name[:100]}.{uuid.uuid4().hex[:12]}.part"

    def _make(self, folder: pathlib.Path) -> None:
        """Make a folder, on the disk too."""
        if folder.is_dir():
            return
        self._make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)

    def sync(self, folders: Iterable[str]) -> None:
        """Wait until the names of files that were written in `folders` are on the disk."""
        for folder in folders:
            with os_errors_as_write_error(self.root / folder, "a folder to write to"):
                _sync_folder(self.root / folder)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{self.root / name}: got {error}, expected a file to read") from None

    def size(self, name: str) -> int:
        """The size of a file in bytes, 0 if there is none."""
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def names(self, folder: str = "") -> set[str]:
        """The names of the files and folders in a folder, none if that is not there."""
        try:
            return set(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except OSError as error:
            raise InputError(f"output: got {self.root} ({error}), expected a folder") from None

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with os_errors_as_write_error(self.root / name, "a file to remove"):
            (self.root / name).unlink(missing_ok=True)


class RemotePlace:
    """A folder of a storage: files are objects, which are put there as a whole."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # only now: most folders are local

        try:
            self._fs, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"output: got {url} ({error}), expected a folder or a URL that fsspec opens"
            ) from None
        self._root = root.rstrip("/")
        self._url = url.rstrip("/")
        self._scratch: pathlib.Path | None = None

    def __str__(self) -> str:
        return self._url

    def show(self, name: str) -> str:
        """The URL of a file, for messages."""
        return f"{self._url}/{name}"

    def use_scratch(self, name: str) -> pathlib.Path:
        """An empty local folder for files that are not complete yet."""
        del name
        self._scratch = pathlib.Path(tempfile.mkdtemp(prefix="jaxdiff-"))
        return self._scratch

    def remove_scratch(self) -> None:
        """Remove the folder of `use_scratch`."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def write(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Write a file; without `replace` False if there is one, which stays as it is."""
        return self._put(name, lambda: self._fs.pipe_file(self._full(name), data), replace)

    def publish(self, name: str, file: pathlib.Path, *, replace: bool) -> bool:
        """Upload a complete local `file`, which is removed; see `write`."""
        is_new = self._put(name, lambda: self._fs.put_file(str(file), self._full(name)), replace)
        if is_new:
            file.unlink()
        return is_new

    def _put(self, name: str, put: Callable[[], Any], replace: bool) -> bool:
        if not replace and self._retry(name, lambda: self._fs.exists(self._full(name))):
            return False
        try:
            self._retry(name, put)
        except FileNotFoundError as error:  # there is no such bucket
            raise WriteError(
                f"{self.show(name)}: got {os_error_message(error)}, expected a file to write"
            ) from None
        return True

    def sync(self, folders: Iterable[str]) -> None:
        """Nothing: objects are there once they are put."""

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            return self._retry(name, lambda: self._fs.cat_file(self._full(name)))
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> set[str]:
        """The names of the files and folders in a folder, none if that is not there."""
        path = f"{self._root}/{folder}".rstrip("/")

        def listed() -> set[str]:
            self._fs.invalidate_cache()
            return {str(name).rstrip("/").rpartition("/")[2] for name in self._fs.ls(path, False)}

        try:
            return self._retry(folder, listed)
        except FileNotFoundError:
            return set()

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._retry(name, lambda: self._fs.rm_file(self._full(name)))

    def _full(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _retry(self, name: str, act: Callable[[], T]) -> T:
        """What `act` returns; it is called again while the storage gives no answer."""
        start, pause = time.monotonic(), FIRST
        while True:
            try:
                return act()
            except FileNotFoundError:
                raise
            except Exception as error:  # each file system has errors of its own
                passed = time.monotonic() - start
                is_final = isinstance(error, PermissionError) or passed > RETRY_SECONDS
                if is_final or SHUTDOWN_REQUESTED.wait(pause):
                    reason = next(iter(str(error).splitlines()), type(error).__name__)
                    raise WriteError(
                        f"{self.show(name)}: got {reason:.160}, expected a file to write"
                    ) from None
            pause = min(2 * pause, LONGEST)


Place = LocalPlace | RemotePlace


def open_place(where: str | pathlib.Path) -> Place:
    """The folder at a path or a URL such as gs://bucket/job; it need not be there yet."""
    text = str(where)
    if is_url(where) and not text.startswith("file://"):
        return RemotePlace(text)
    return LocalPlace(pathlib.Path(text.removeprefix("file://")))


def _sync_folder(folder: pathlib.Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems that do not know it of folders
            os.fsync(handle)
    finally:
        os.close(handle)


class LocalLog:
    """A file of lines of which none is lost or cut once `append` has returned.

    One process writes it at a time: InputError while another one does.
    """

    def __init__(self, path: pathlib.Path, name: str) -> None:
        self._path = path
        with os_errors_as_write_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: Any = path.open("a+b", buffering=0)
            _sync_folder(path.parent)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"output: got {name}, which another process writes, expected that one to end first"
            ) from None
        except OSError:  # a file system without locks
            pass

    def lines(self) -> Iterator[bytes]:
        """The lines; one that a killed process has cut is removed."""
        self._file.seek(0)
        end = 0
        with open(os.dup(self._file.fileno()), "rb") as reader:
            for line in reader:
                if line.endswith(b"\n"):
                    end += len(line)
                    yield line
        with os_errors_as_write_error(self._path):
            self._file.truncate(end)

    def append(self, data: bytes) -> None:
        """Write lines to the disk."""
        with os_errors_as_write_error(self._path):
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which another process may write then."""
        self._file.close()


class PartsLog:
    """A log in a storage, where nothing can be appended: parts, each put anew until it is full."""

    PART_SIZE = 1 << 20  # bytes

    def __init__(self, place: RemotePlace, folder: str) -> None:
        self._place, self._folder = place, folder
        self._names = sorted(name for name in place.names(folder) if name.endswith(".jsonl"))
        self._number = int(self._names[-1].split(".")[0]) + 1 if self._names else 0
        self._part = b""
        self._lock = threading.Lock()

    def lines(self) -> Iterator[bytes]:
        """The lines of the parts that were there when the log was opened."""
        for name in self._names:
            yield from (self._place.read(f"{self._folder}/{name}") or b"").splitlines(True)

    def append(self, data: bytes) -> None:
        """Put lines into the storage."""
        with self._lock:
            self._part += data
            self._place.write(f"{self._folder}/{self._number:06d}.jsonl", self._part, replace=True)
            if len(self._part) >= self.PART_SIZE:
                self._number, self._part = self._number + 1, b""

    def close(self) -> None:
        """Nothing: parts are there once they are put."""
