"""Where the images of a batch job go: files in folders, webdataset tars, or OpenAI's output file.

Each has a `JobManifest`, by which the same command resumes: each image is there once, however often
the process was killed.
"""

import abc
import contextlib
import dataclasses
import hashlib
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.generation.image_files import (
    LATENTS,
    SUFFIXES,
    check_format,
    encode,
    settings_in,
)
from jaxdiff.generation.job_manifest import Entry, JobManifest
from jaxdiff.generation.places import Place
from jaxdiff.generation.prompt_stream import BadLine, LineImage
from jaxdiff.generation.shards import Shard

FOLDER_SIZE = 10_000  # images


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageItem:
    """An image that is generated, and what is to be known of it."""

    index: int  # of its prompt, from 0
    number: int = 0  # among the images of the prompt, from 0
    count: int = 1  # of the images of the prompt
    name: str  # of its file, without suffix
    source: str = ""  # FILE:LINE
    custom_id: str | None = None  # of a request of OpenAI's Batch API
    seed: int
    image: Any  # PIL, uint8 (h, w, 3), or latents
    settings: Mapping[str, Any]  # that the file carries
    image_format: str | None = None  # None: the job's
    quality: int | None = None  # of WebP and JPEG; None: the job's

    @classmethod
    def of(cls, planned: LineImage, image: Any, settings: Mapping[str, Any]) -> "ImageItem":
        """The image that a line of a prompt file asks for, once it is generated."""
        line = planned.line
        return cls(
            index=line.index,
            number=planned.number,
            count=planned.count,
            name=planned.name,
            source=line.source,
            custom_id=line.custom_id,
            seed=planned.seed,
            image=image,
            settings=settings,
            image_format=line.image_format,
            quality=line.quality,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image, or of the latents."""
        if isinstance(self.image, Image.Image):
            return self.image.size
        height, width = np.shape(self.image)[:2]
        return int(width), int(height)

    def entry(self, file: str, size: int) -> dict[str, Any]:
        """The line of the manifest about it; `size` is that of the file in bytes."""
        width, height = self.size
        request = {} if self.custom_id is None else {"custom_id": self.custom_id}
        return {
            "index": self.index,
            "number": self.number,
            "source": self.source,
            **request,
            "file": file,
            "seed": self.seed,
            "width": width,
            "height": height,
            "size": size,
        }


class WriteLock:
    """A lock of what several threads append to; after an error in it nobody gets it any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_broken = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._is_broken:
            self._lock.release()
            raise WriteError("output: got an error before, expected none")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._is_broken = error is not None
        self._lock.release()


class Output(abc.ABC):
    """Where the images of a shard of a job go. `write` and `fail` may be called by many threads."""

    container: str

    def __init__(
        self, place: Place, key: str, shard: Shard, *, image_format: str, quality: int | None
    ) -> None:
        check_format(image_format, quality)
        self._place, self._format, self._quality = place, image_format, quality
        self._check(key)
        self.manifest = JobManifest(
            place, key, shard, container=self.container, is_there=self._is_there
        )
        try:
            self._scratch = place.use_scratch(f"{self.manifest.folder}/{shard.label}.tmp")
        except BaseException:
            self.manifest.close()
            raise

    @property
    def stores_latents(self) -> bool:
        """Whether its files are of latents, not of images."""
        return self._format == LATENTS

    def done(self, index: int, number: int) -> bool:
        """Whether the image is there."""
        return self.manifest.done(index, number)

    def write(self, item: ImageItem) -> None:
        """Write an image; one that is not finite is a failure. Raises WriteError."""
        try:
            _check_finite(item.image)
            data = encode(item.image, item.settings, *self._encoding(item))
        except InputError as error:  # of what the format does not hold, too
            self.fail_item(item, str(error))
        else:
            self._store(item, data)

    def fail_line(self, line: BadLine) -> None:
        """Record that there is no image of a line of the prompt file."""
        self.fail(line.index, None, line.reason, source=line.source, custom_id=line.custom_id)

    def fail_item(self, item: ImageItem, reason: str) -> None:
        """Record that an image is none."""
        self.fail(item.index, item.number, reason, source=item.source, custom_id=item.custom_id)

    def fail(
        self,
        index: int,
        number: int | None,
        reason: str,
        *,
        source: str = "",
        custom_id: str | None = None,
    ) -> None:
        """Record that there is no image, and why; `number` None: none of a line's.

        The same command tries it again.
        """
        request = {} if custom_id is None else {"custom_id": custom_id}
        self.manifest.record(
            {"index": index, "number": number, "source": source, **request, "error": reason}
        )

    def close(self) -> None:
        """Write what is left. Raises WriteError."""
        try:
            self._finish()
        finally:
            self.manifest.close()
        self._place.remove_scratch()

    def abort(self) -> None:
        """Stop without writing what is left, after an error; the same command resumes."""
        try:
            self.manifest.close()
        finally:
            self._place.remove_scratch()

    def _encoding(self, item: ImageItem) -> tuple[str, int | None]:
        image_format = item.image_format or self._format
        own = item.quality if item.quality is not None else self._quality
        return image_format, own if image_format in ("webp", "jpeg") else None

    def _suffix(self, item: ImageItem) -> str:
        return SUFFIXES[self._encoding(item)[0]]

    def _check(self, key: str) -> None:  # noqa: B027
        """InputError for a place that holds what is not the job's."""

    @abc.abstractmethod
    def _is_there(self, entry: Entry) -> bool:
        """Whether the file of a line of the manifest is there."""

    @abc.abstractmethod
    def _store(self, item: ImageItem, data: bytes) -> None:
        """Write an encoded image, and record it once it is durable."""

    def _finish(self) -> None:  # noqa: B027
        """Write what is left."""


class FolderOutput(Output):
    """A file for each image, in folders of FOLDER_SIZE images.

    No file is overwritten: an image whose name has a file with other settings gets a longer name.
    """

    container = "folder"

    def __init__(
        self,
        place: Place,
        key: str,
        shard: Shard,
        *,
        image_format: str = "png",
        quality: int | None = None,
        subfolders: bool = True,
        verify: bool = True,
    ) -> None:
        self._subfolders, self._verify = subfolders, verify
        self._listed: OrderedDict[str, set[str]] = OrderedDict()  # names in the last few folders
        super().__init__(place, key, shard, image_format=image_format, quality=quality)
        self._listed.clear()

    def _is_there(self, entry: Entry) -> bool:
        if not self._verify:
            return True
        folder, _, name = str(entry["file"]).rpartition("/")
        if folder not in self._listed:
            self._listed[folder] = self._place.names(folder)
            if len(self._listed) > 8:
                self._listed.popitem(last=False)
        return name in self._listed[folder]

    def _store(self, item: ImageItem, data: bytes) -> None:
        suffix = self._suffix(item)
        folder = folder_of(item.index, item.number, item.count) if self._subfolders else ""
        prefix = f"{folder}/" if folder else ""
        own = f"{prefix}{item.name}{suffix}"
        content = json.dumps(item.settings, sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        longer = f"{prefix}{item.name}-{digest}{suffix}"
        size = len(data)
        if self._place.write(own, data, replace=False):
            file = own
        elif (there := self._same(own, item)) is not None:
            file, size = own, there
        elif self._place.write(longer, data, replace=False):
            file = longer
        else:
            file, there = longer, self._same(longer, item)
            size = size if there is None else there
            if there is None:  # a file that is damaged: its name has the digest of these settings
                self._place.write(longer, data, replace=True)
        self.manifest.record(item.entry(file, size), folder)

    def _same(self, file: str, item: ImageItem) -> int | None:
        """The size of a file that has the settings of an image; None if it has others."""
        data = self._place.read(file)
        if data is None:
            return None
        stored = None
        with contextlib.suppress(InputError):  # settings that contradict themselves
            stored = settings_in(io.BytesIO(data), source=self._place.show(file))
        wanted = json.loads(json.dumps(item.settings))
        is_same = stored is not None and _without_none(stored) == _without_none(wanted)
        return len(data) if is_same else None


def folder_of(index: int, number: int, count: int) -> str:
    """The folder of image `number` of the `count` images of a line.

    A folder has the images of as many lines as fit into FOLDER_SIZE, or a part of those of one.
    """
    lines = max(FOLDER_SIZE // count, 1)
    part = f"-{number // FOLDER_SIZE:03d}" if count > FOLDER_SIZE else ""
    return f"{index // lines:06d}{part}"


def _check_finite(image: Any) -> None:
    """InputError for latents that are not finite."""
    array = np.empty(0) if isinstance(image, Image.Image) else np.asarray(image)
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise InputError("image: got numbers that are not finite, expected an image")


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, of which None stands for one that is left out."""
    return {name: value for name, value in settings.items() if value is not None}
