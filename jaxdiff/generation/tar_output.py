"""Webdataset tars of the images of a job: KEY.png and KEY.json behind one another."""

import io
import json
import pathlib
import re
import tarfile
from typing import Any

from jaxdiff.core.atomic import os_errors_as_write_error
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import positive
from jaxdiff.generation.job_manifest import FOLDER, Entry
from jaxdiff.generation.outputs import ImageItem, Output, WriteLock
from jaxdiff.generation.places import Place
from jaxdiff.generation.shards import Shard

IMAGES = 1000  # of a tar
ENTRY = "entry"  # of KEY.json: the line of the manifest


class TarOutput(Output):
    """Tars SHARD-NUMBER.tar of `images` images each, or fewer from `max_bytes` on.

    A tar has its name once it is complete; its images are lost to a kill before that, and are
    generated again. KEY.json has the settings. InputError for a folder with the tars of another
    job.
    """

    container = "tar"

    def __init__(
        self,
        place: Place,
        key: str,
        shard: Shard,
        *,
        image_format: str = "png",
        quality: int | None = None,
        images: int = IMAGES,
        max_bytes: int | None = None,
    ) -> None:
        self._images, self._max_bytes = positive("images", images), max_bytes
        if max_bytes is not None:
            positive("max_bytes", max_bytes)
        self._prefix = f"{shard.index:05d}"
        self._lock = WriteLock()
        self._tar: tarfile.TarFile | None = None
        self._file, self._name = pathlib.Path(), ""
        self._entries: list[Entry] = []
        self._bytes = 0
        self._tars = {name for name in place.names() if name.endswith(".tar")}
        super().__init__(place, key, shard, image_format=image_format, quality=quality)
        try:
            self._recover()
        except BaseException:
            self.abort()
            raise

    def _check(self, key: str) -> None:
        if self._tars and key not in self._place.names(FOLDER):
            raise InputError(
                f"output: got {self._place} with the tars of another job, such as "
                f"{min(self._tars)}, expected an empty folder"
            )

    def _recover(self) -> None:
        """Record the images of a tar that was completed when the process was killed."""
        for name in sorted(self.manifest.intents & self._tars - self.manifest.containers):
            data = self._place.read(name) or b""
            for entry in _stored_entries(data):
                self.manifest.record(entry | {"file": f"{name}/{entry['file']}"})
        self.manifest.flush()
        numbers = [
            int(found[1])
            for name in self._tars
            if (found := re.fullmatch(rf"{self._prefix}-(\d+)\.tar", name))
        ]
        self._number = max(numbers, default=-1) + 1

    def _is_there(self, entry: Entry) -> bool:
        return str(entry["file"]).partition("/")[0] in self._tars

    def _store(self, item: ImageItem, data: bytes) -> None:
        key = item.name.replace(".", "-")  # a key ends at the first dot
        member = f"{key}{self._suffix(item)}"
        entry = item.entry(member, len(data))
        text = json.dumps({**item.settings, ENTRY: entry}, ensure_ascii=False).encode()
        with self._lock, os_errors_as_write_error(self._file):
            tar = self._tar or self._open()
            _add(tar, member, data)
            _add(tar, f"{key}.json", text)
            self._entries.append(entry | {"file": f"{self._name}/{member}"})
            self._bytes += len(data) + len(text)
            is_full = self._max_bytes is not None and self._bytes >= self._max_bytes
            if is_full or len(self._entries) >= self._images:
                self._complete(tar)

    def _open(self) -> tarfile.TarFile:
        self._name = f"{self._prefix}-{self._number:06d}.tar"
        self._number += 1
        self._file = self._scratch / self._name
        self._tar = tarfile.open(self._file, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        return self._tar

    def _complete(self, tar: tarfile.TarFile) -> None:
        """Give a tar its name, and record its images."""
        tar.close()
        self.manifest.intend(self._name)
        if not self._place.publish(self._name, self._file, replace=False):
            raise InputError(
                f"{self._place.show(self._name)}: got a tar that is not this job's, expected none"
            )
        for entry in self._entries:
            self.manifest.record(entry)
        self.manifest.flush()
        self._tar, self._entries, self._bytes = None, [], 0

    def _finish(self) -> None:
        with self._lock:
            if self._tar is not None:
                self._complete(self._tar)

    def abort(self) -> None:
        """Stop without the tar that is not complete; the same command resumes."""
        if self._tar is not None:
            self._tar.fileobj.close()  # pyright: ignore[reportOptionalMemberAccess]
        super().abort()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    tar.members = []  # pyright: ignore  # it would keep all of them in memory


def _stored_entries(data: bytes) -> list[dict[str, Any]]:
    """The lines of the manifest in a complete tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
        return [json.loads(file.read())[ENTRY] for file in files if file is not None]
