"""The output file and the error file of OpenAI's Batch API: a line for each request.

For an input INPUT.jsonl they are INPUT_output.jsonl and INPUT_error.jsonl, with the shard in the
name where there are several. A request is in one of them, once. The images of a request are in
memory until all of them are there.
"""

import abc
import json
import os
import pathlib
import re
import time
from typing import Any

from jaxdiff.core.atomic import os_errors_as_write_error
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.generation.job_manifest import Entry, JobManifest
from jaxdiff.generation.openai_batch import FORMATS, error_entry, response_entry
from jaxdiff.generation.outputs import ImageItem, Output, WriteLock
from jaxdiff.generation.places import LocalPlace, Place, RemotePlace
from jaxdiff.generation.shards import Shard

PART_SIZE = 64 << 20  # bytes of an object, in a storage
BAD_REQUEST, FAILED = "invalid_request", "generation_failed"  # codes of errors


class OpenAIOutput(Output):
    """INPUT_output.jsonl, to which a line is appended once all images of its request are there.

    In a storage, where nothing can be appended, INPUT_output-NUMBER.jsonl of PART_SIZE each.
    INPUT_error.jsonl is written when the output is closed. InputError for files of another job.
    """

    container = "openai"

    def __init__(
        self,
        place: Place,
        key: str,
        shard: Shard,
        *,
        stem: str,
        image_format: str = "png",
        quality: int | None = None,
    ) -> None:
        one_of("image_format", image_format, FORMATS)
        label = f"-{shard.label}" if shard.count > 1 else ""
        self._output, self._error = f"{stem}_output{label}", f"{stem}_error{label}.jsonl"
        self._lock = WriteLock()
        self._images: dict[int, dict[int, bytes]] = {}  # of requests that are not complete
        self._failed: set[int] = set()
        self._names = place.names()
        super().__init__(place, key, shard, image_format=image_format, quality=quality)
        self._writer: _Appended | _Parts | None = None
        try:
            self._check_files()
            if isinstance(place, LocalPlace):
                self._writer = _Appended(place, self.manifest, f"{self._output}.jsonl")
            else:
                self._writer = _Parts(place, self.manifest, self._output, self._scratch)
        except BaseException:
            self.abort()
            raise

    def _check_files(self) -> None:
        pattern = rf"{re.escape(self._output)}(-\d{{6}})?\.jsonl|{re.escape(self._error)}"
        own = {name for name in self._names if re.fullmatch(pattern, name)}
        if others := own - self.manifest.intents:
            raise InputError(
                f"output: got {self._place.show(min(others))}, which another job has written, "
                "expected a folder without it"
            )

    def _is_there(self, entry: Entry) -> bool:
        if isinstance(self._place, LocalPlace):
            return self._place.size(str(entry["file"])) >= entry.get("end", 0)
        return entry["file"] in self._names

    def _store(self, item: ImageItem, data: bytes) -> None:
        if item.custom_id is None:
            self.fail_item(item, f"{item.source}: got no field 'custom_id', expected one")
            return
        with self._lock:
            if item.index in self._failed:
                return
            images = self._images.setdefault(item.index, {})
            images[item.number] = data
            if len(images) < item.count or self._writer is None:
                return
            del self._images[item.index]
            files = [images[number] for number in range(item.count)]
            line = response_entry(
                self.manifest.key, item.index, item.custom_id, files, created=int(time.time())
            )
            entry = {
                "index": item.index,
                "number": None,
                "images": item.count,
                "source": item.source,
                "custom_id": item.custom_id,
                "seed": item.seed - item.number,
            }
            self._writer.add(json.dumps(line).encode() + b"\n", entry)

    def fail(
        self,
        index: int,
        number: int | None,
        reason: str,
        *,
        source: str = "",
        custom_id: str | None = None,
    ) -> None:
        """Record that a request has an error; its images, if some are there, are dropped."""
        with self._lock:
            self._failed.add(index)
            self._images.pop(index, None)
        super().fail(index, number, reason, source=source, custom_id=custom_id)

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
        errors: dict[int, Entry] = {}
        for (index, _), entry in sorted(self.manifest.failures.items(), key=_order):
            errors.setdefault(index, entry)
        if not errors:
            if self._error in self.manifest.intents:
                self._place.remove(self._error)
            return
        lines = [
            error_entry(
                self.manifest.key,
                index,
                entry.get("custom_id"),
                BAD_REQUEST if entry["number"] is None else FAILED,
                entry["error"],
            )
            for index, entry in errors.items()
        ]
        self.manifest.intend(self._error)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._place.write(self._error, text.encode(), replace=True)

    def abort(self) -> None:
        """Stop without what is not complete; the same command resumes."""
        if self._writer is not None:
            self._writer.abort()
        super().abort()


def _order(failure: tuple[tuple[int, int | None], Any]) -> tuple[int, int]:
    """Failures in the order of the lines, that of a line as a whole first."""
    index, number = failure[0]
    return index, -1 if number is None else number


class _Writer(abc.ABC):
    """A file of lines, each of which has an entry in the manifest once it is durable."""

    @abc.abstractmethod
    def add(self, line: bytes, entry: dict[str, Any]) -> None:
        """Append a line."""

    @abc.abstractmethod
    def close(self) -> None:
        """Write what is left."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Stop without what is left."""


class _Appended(_Writer):
    """A local file. What the manifest does not know of when it is opened is cut off."""

    def __init__(self, place: LocalPlace, manifest: JobManifest, name: str) -> None:
        self._manifest, self._name, self._path = manifest, name, place.root / name
        manifest.intend(name)
        with os_errors_as_write_error(self._path):
            self._file: Any = self._path.open("ab", buffering=0)
            self._file.truncate(manifest.ends.get(name, 0))
        manifest.before_flush = self._sync

    def _sync(self) -> None:
        with os_errors_as_write_error(self._path):
            os.fsync(self._file.fileno())

    def add(self, line: bytes, entry: dict[str, Any]) -> None:
        with os_errors_as_write_error(self._path):
            view = memoryview(line)
            while view:
                view = view[self._file.write(view) :]
            end = self._file.seek(0, os.SEEK_END)
        self._manifest.record(entry | {"file": self._name, "end": end})

    def close(self) -> None:
        self._manifest.flush()
        self._manifest.before_flush = lambda: None
        self._file.close()

    def abort(self) -> None:
        """Stop; what the manifest does not know of is cut off at the next start."""
        try:
            self.close()
        except InputError:  # raised before, by the call that wrote
            self._file.close()


class _Parts(_Writer):
    """Objects of PART_SIZE, put once they are full; one that the manifest does not know is none."""

    def __init__(
        self, place: RemotePlace, manifest: JobManifest, stem: str, scratch: pathlib.Path
    ) -> None:
        self._place, self._manifest, self._stem = place, manifest, stem
        found = [re.fullmatch(rf"{re.escape(stem)}-(\d{{6}})\.jsonl", n) for n in place.names()]
        own = {each[0]: int(each[1]) for each in found if each is not None}
        for name in own.keys() - manifest.containers:  # put just before the process was killed
            place.remove(name)
        known = [number for name, number in own.items() if name in manifest.containers]
        self._number = max(known, default=-1) + 1
        self._path = scratch / "part.jsonl"
        self._entries: list[dict[str, Any]] = []
        self._size = 0
        self._file: Any = None

    def add(self, line: bytes, entry: dict[str, Any]) -> None:
        with os_errors_as_write_error(self._path):
            self._file = self._file or self._path.open("wb")
            self._file.write(line)
        self._entries.append(entry)
        self._size += len(line)
        if self._size >= PART_SIZE:
            self.close()

    def close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        name = f"{self._stem}-{self._number:06d}.jsonl"
        self._manifest.intend(name)
        self._place.publish(name, self._path, replace=True)
        for entry in self._entries:
            self._manifest.record(entry | {"file": name})
        self._manifest.flush()
        self._number, self._entries, self._size = self._number + 1, [], 0

    def abort(self) -> None:
        if self._file is not None:
            self._file.close()
