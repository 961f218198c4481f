"""Files and folders that appear whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator

from jaxdiff.core.errors import InputError, WriteError, os_error_message


@contextlib.contextmanager
def os_errors_as_write_error(
    target: pathlib.Path, wanted: str = "a file to write"
) -> Iterator[None]:
    """Turn what the operating system says of `target` into a WriteError."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{target}: got {os_error_message(error)}, expected {wanted}") from None


@contextlib.contextmanager
def atomic_folder(
    target: pathlib.Path, *, marker: str, stale: tuple[str, ...] = ()
) -> Iterator[pathlib.Path]:
    """A temporary folder beside `target` that takes its place when the block ends well.

    An existing `target` is replaced only if it is empty or holds the file `marker`, which says that
    it is of the same kind. What it holds under other names than the new one (a README) moves over,
    except names that match a pattern in `stale`. On an error `target` is as it was.
    """
    target = target.resolve()
    _check_target(target, marker)
    with os_errors_as_write_error(target, "a folder that can be written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        new, old = work / "new", work / "old"
        new.mkdir()
        try:
            yield new
            if target.exists():
                target.rename(old)
            new.rename(target)
            if old.exists():
                _move_user_files(old, target, stale)
                shutil.rmtree(old)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            if not old.exists():  # it has what could not be moved
                shutil.rmtree(work)


def check_file(target: pathlib.Path) -> None:
    """InputError unless a file `target` can be written; makes the folder that it is to lie in."""
    with os_errors_as_write_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        pathlib.Path(name).unlink()
    if target.is_dir():
        raise InputError(f"{target}: got a folder, expected a file to write")


@contextlib.contextmanager
def atomic_file(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary file beside `target` that takes its place when the block ends well.

    Makes the folder that it lies in. Several may write one target, on several machines too: the
    last to end is there then.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with os_errors_as_write_error(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):  # a folder that is none, or was never made
            temporary.unlink(missing_ok=True)


def remove_leftovers(targets: Iterable[pathlib.Path]) -> None:
    """Remove what `atomic_file` of a process that was killed has left beside these files."""
    names: dict[pathlib.Path, set[str]] = {}
    for target in targets:
        names.setdefault(target.parent, set()).add(target.name)
    for folder, wanted in names.items():
        for part in folder.glob(".*.part"):
            if part.name[1:].rsplit(".", 2)[0] in wanted:
                part.unlink(missing_ok=True)


def _check_target(target: pathlib.Path, marker: str) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: got a file, expected a folder to write to")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).exists():
        raise InputError(
            f"{target}: got a folder with other files in it, expected a new or empty folder, "
            f"or one with {marker}, which is then replaced"
        )


def _move_user_files(old: pathlib.Path, target: pathlib.Path, stale: tuple[str, ...]) -> None:
    for entry in list(old.iterdir()):
        replaced = (target / entry.name).exists() or any(entry.match(p) for p in stale)
        if not replaced:
            entry.rename(target / entry.name)
