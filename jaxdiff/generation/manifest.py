"""The manifest of a job: a JSON line for each image. It tells without a model what is there.

Its key covers the options of a command and, by size and time of change, the files that it reads. A
job is done while each of its images has the size and time that it was left with.
"""

import glob
import hashlib
import itertools
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jaxdiff
from jaxdiff.core.atomic import atomic_file, os_errors_as_write_error
from jaxdiff.generation.prompt_file import ImageJob

FOLDER = ".jobs"  # in the folder of the images
MAX_FILES = 1000


class Entry(NamedTuple):
    """An image of a job: its file, seed, FILE:LINE of its prompt, and the state of the file."""

    image: str
    seed: int
    source: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: pathlib.Path, seed: int, source: str) -> "Entry":
        """The entry of an image that is written."""
        state = path.stat()
        return cls(path.name, seed, source, state.st_size, state.st_mtime_ns)


class Manifest(NamedTuple):
    """The file of a job's entries, in the folder of its images."""

    path: pathlib.Path
    is_comparable: bool  # whether all files that the job reads are here, to be compared

    @classmethod
    def of(
        cls, output: pathlib.Path, options: Mapping[str, Any], files: Iterable[str | pathlib.Path]
    ) -> "Manifest":
        """That of a command with these `options`, which reads `files`."""
        paths = [pathlib.Path(name).resolve() for name in files]
        states = {str(path): _state(path) for path in paths}
        place = (jaxdiff.__version__, platform.node(), os.environ.get("JAX_PLATFORMS", ""))
        content = json.dumps([place, options, states], sort_keys=True, default=str)
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        return cls(output / FOLDER / f"{name}.jsonl", None not in states.values())

    def read(self, jobs: Sequence[ImageJob]) -> list[Entry] | None:
        """The entries, if there is the image of each of `jobs`; None if anything may be left to do.

        A damaged manifest is none.
        """
        folder = self.path.parents[1]
        try:
            lines = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]
            if not self.is_comparable or any("error" in line for line in lines):
                return None
            entries = [Entry(**line) for line in lines]
            now = [Entry.of(folder / e.image, e.seed, e.source) for e in entries]
        except (OSError, ValueError, TypeError):
            return None
        asked = [(job.seed, job.source) for job in jobs]
        is_whole = [(entry.seed, entry.source) for entry in entries] == asked
        return entries if is_whole and now == entries else None

    def write(self, entries: Sequence[Entry], failures: Mapping[str, str]) -> None:
        """Write the entries of the images that are there, and why others are not, by name."""
        lines = [entry._asdict() for entry in entries]
        lines += [{"image": f"{name}.png", "error": reason} for name, reason in failures.items()]
        with os_errors_as_write_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _state(path: pathlib.Path) -> list[Any] | None:
    """Sizes and times of a file, or of the files of a model's folder; None if there is none.

    Of a file those of its neighbours of the same name too, such as a config beside weights. A
    folder with more than MAX_FILES is that of no model: None.
    """
    if path.is_dir():
        found = (each for form in ("*", "*/*") for each in path.glob(form) if each.is_file())
        paths = sorted(itertools.islice(found, MAX_FILES + 1))
        if len(paths) > MAX_FILES:
            return None
    elif path.is_file():
        paths = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*")) or [path]
    else:
        return None
    states = ((str(each), each.stat()) for each in paths)
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]
