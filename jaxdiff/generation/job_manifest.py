"""The manifest of a batch job: a JSON line for each image, by which the same command resumes.

`.jobs/KEY/SHARD.jsonl` in the folder of the images (in a storage `.jobs/KEY/SHARD/NUMBER.jsonl`)
begins with a line about the job. Then there is a line for each image that is durably written,

    {"index", "number", "source", "custom_id", "file", "seed", "width", "height", "size"}

or that could not be made, `{"index", "number", "source", "custom_id", "error"}`, with `number` null
for a line of the prompt file as a whole. The last line about an image counts. `index` is that of
its prompt, `number` is its own among the images of that. In OpenAI's output file all `images` of a
prompt are one line, which has `number` null and `end`, where the file ended then.
"""

import contextlib
import json
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.generation.places import LocalLog, LocalPlace, PartsLog, Place, RemotePlace
from jaxdiff.generation.shards import Shard

FOLDER = ".jobs"  # in the folder of the images
VERSION = 1
SECONDS = 0.2  # for which lines are collected before they are written together
REMOTE_SECONDS = 10.0  # in a storage, where that puts an object

Entry = Mapping[str, Any]


class ImageSet:
    """Images by index and number, about two bits for each: millions fit in memory."""

    LINES, NUMBERS = 256, 8  # of a page

    def __init__(self) -> None:
        self._pages: dict[tuple[int, int], bytearray] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, image: tuple[int, int]) -> bool:
        index, number = image
        page = self._pages.get((index // self.LINES, number // self.NUMBERS))
        return page is not None and bool(page[index % self.LINES] >> number % self.NUMBERS & 1)

    def add(self, index: int, number: int) -> None:
        """Add an image, if it is not there."""
        key = (index // self.LINES, number // self.NUMBERS)
        page = self._pages.setdefault(key, bytearray(self.LINES))
        bit = 1 << number % self.NUMBERS
        self._count += not page[index % self.LINES] & bit
        page[index % self.LINES] |= bit


class JobManifest:
    """The manifest of a shard of the job `key`, which has all options that matter.

    `is_there` says of a line about an image whether its file still is. Safe for threads. InputError
    for a shard that another process writes, and for a `container` other than the job's.
    """

    def __init__(
        self,
        place: Place,
        key: str,
        shard: Shard,
        *,
        container: str,
        is_there: Callable[[Entry], bool] = lambda entry: True,
    ) -> None:
        self.key, self.shard = key, shard
        self.failures: dict[tuple[int, int | None], Entry] = {}  # the last of each
        self.intents: set[str] = set()  # files that the job has begun to write
        self.containers: set[str] = set()  # files of several images that the manifest has
        self.ends: dict[str, int] = {}  # of files that images were appended to
        self.folder = f"{FOLDER}/{key}"
        self._place, self._container, self._is_there = place, container, is_there
        self._done = ImageSet()
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._pending: list[bytes] = []
        self._folders: set[str] = set()
        self._error: Exception | None = None
        self.before_flush: Callable[[], None] = lambda: None  # brings to the disk what lines name
        self._log = self._open()
        self.is_new = not self._read()
        self._closed = threading.Event()
        self._period = SECONDS if isinstance(place, LocalPlace) else REMOTE_SECONDS
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def path(self) -> str:
        """Where the manifest is, for reports."""
        suffix = ".jsonl" if isinstance(self._place, LocalPlace) else ""
        return self._place.show(f"{self.folder}/{self.shard.label}{suffix}")

    def __len__(self) -> int:
        """The number of images of the shard that are there."""
        return len(self._done)

    def done(self, index: int, number: int) -> bool:
        """Whether an image is there."""
        return (index, number) in self._done

    def record(self, entry: Entry, folder: str = "") -> None:
        """Add a line about an image whose file is written in `folder`, or that has none.

        It is on the disk SECONDS later. Raises what has prevented that for earlier ones.
        """
        with self._lock:
            if entry.get("error") is not None and not self._is_news(entry):
                return
            self._apply(entry)
            self._pending.append(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._folders.add(folder)
        self._raise()

    def intend(self, file: str) -> None:
        """Note, on the disk when this returns, that the job writes `file`."""
        with self._lock:
            is_known = file in self.intents
            if not is_known:
                self.intents.add(file)
                self._pending.append(json.dumps({"intent": file}).encode() + b"\n")
        if not is_known:
            self.flush()

    def flush(self) -> None:
        """Write the lines that are not written yet, behind the files that they are about."""
        with self._flushing:
            self._raise()
            with self._lock:
                data, folders = b"".join(self._pending), self._folders
                self._pending, self._folders = [], set()
            if not data:
                return
            try:
                self._place.sync(sorted(folders))
                self.before_flush()
                self._log.append(data)
            except Exception as error:  # nothing may be written behind what is missing
                self._error = error
                raise

    def close(self) -> None:
        """Write what is left, and let other processes write the manifest."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        try:
            self.flush()
        finally:
            self._log.close()

    def _run(self) -> None:
        while not self._closed.wait(self._period):
            try:
                self.flush()
            except Exception:  # which the next call raises
                return

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _is_news(self, entry: Entry) -> bool:
        """Whether a failure is none that the manifest has already, for the same reason."""
        known = self.failures.get((entry["index"], entry["number"]))
        return known is None or known["error"] != entry["error"]

    def _open(self) -> LocalLog | PartsLog:
        name = f"{self.folder}/{self.shard.label}"
        if isinstance(self._place, RemotePlace):
            return PartsLog(self._place, name)
        return LocalLog(self._place.root / f"{name}.jsonl", f"shard {self.shard} of {self._place}")

    def _read(self) -> bool:
        """Read the lines that there are, of former shards of other sizes too; whether any are."""
        before = False
        try:
            for entry in _entries(self._log.lines()):
                before = True
                self._check_job(entry)
                self._apply_stored(entry)
            for lines in self._other_layouts():
                for entry in _entries(lines):
                    index = entry.get("index")
                    if isinstance(index, int) and self.shard.owns(index):
                        self._apply_stored(entry, is_own=False)
            if not before:
                job = {"job": self.key, "shard": str(self.shard), "container": self._container}
                self._log.append(json.dumps(job | {"version": VERSION}).encode() + b"\n")
        except BaseException:
            self._log.close()
            raise
        return before

    def _check_job(self, entry: Entry) -> None:
        got = entry.get("container", self._container)
        if "job" in entry and got != self._container:
            raise InputError(
                f"output: got the job of {self.path}, whose images are in a {got}, "
                f"expected a {self._container}"
            )

    def _other_layouts(self) -> Iterator[Iterator[bytes]]:
        """The lines of each shard of the same job when it had another number of shards."""
        own = self.shard.label.partition("-of-")[2]
        for name in sorted(self._place.names(self.folder)):
            label = name.removesuffix(".jsonl")
            if label.partition("-of-")[2] in ("", own) or name.endswith(".tmp"):
                continue
            if isinstance(self._place, LocalPlace):
                yield _file_lines(self._place.root / self.folder / name)
            else:
                yield PartsLog(self._place, f"{self.folder}/{name}").lines()

    def _apply_stored(self, entry: Entry, *, is_own: bool = True) -> None:
        """Take in a line of the file, unless the file that it is about is gone."""
        if is_own and isinstance(entry.get("intent"), str):
            self.intents.add(entry["intent"])
        if "index" in entry and ("error" in entry or self._is_there(entry)):
            self._apply(entry)

    def _apply(self, entry: Entry) -> None:
        index, number = entry["index"], entry.get("number")
        if "error" in entry:
            if number is None or (index, number) not in self._done:
                self.failures[index, number] = entry
            return
        file, separator, _ = str(entry["file"]).partition(".tar/")
        if separator or number is None:
            self.containers.add(f"{file}.tar" if separator else file)
            self.ends[file] = max(self.ends.get(file, 0), entry.get("end", 0))
        numbers = range(entry["images"]) if number is None else (number,)
        for each in numbers:
            self._done.add(index, each)
            self.failures.pop((index, each), None)
        if number is None:
            self.failures.pop((index, None), None)


def _file_lines(path: pathlib.Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _entries(lines: Iterator[bytes]) -> Iterator[Entry]:
    """The objects in lines; what a failing disk has left of others is passed over."""
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry
