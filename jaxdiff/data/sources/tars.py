"""Webdataset tars as img2dataset writes them: KEY.jpg, KEY.txt and KEY.json behind one another.

The caption of a sample is the first that it has of KEY.txt, KEY.caption and KEY.json.

Every tar is read once to list where its members lie; the lists are kept in a cache folder. After
that any sample is one read of a few hundred kilobytes, on a disk as in a bucket.
"""

import hashlib
import os
import pathlib
import posixpath
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Int, NDArray
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.sources import Record
from jaxdiff.data.sources.captions import (
    CAPTION_FILES,
    DEFAULT_KEY,
    EMPTY,
    JSON_FILE,
    NO_CAPTION,
    TEXT_FILES,
    read_caption,
)
from jaxdiff.data.sources.folder import EXTENSIONS, NO_IMAGE
from jaxdiff.data.sources.storage import Storage, fingerprint, version

READERS = 8  # tars that are listed at the same time
TRUNCATED = "truncated or broken tar"
COMPRESSED = (".tgz", *(f".tar.{kind}" for kind in ("gz", "bz2", "xz", "zst")))
INDEX_VERSION = "2"  # of cached indices


class TarIndex(NamedTuple):
    """Where the samples of a tar lie, and what is wrong with others."""

    # Begin and end of the image, begin and end of the caption, whether that is in a JSON object.
    members: Int[NDArray, "n 5"]
    without_caption: int
    empty: int
    without_image: int
    several_images: int  # samples with more than one
    several_captions: int  # samples with more than one file of text
    truncated: bool


class TarSource:
    """The samples of all .tar files below a folder, in the order of the files and in them.

    `cache` is a local folder. Without `captions` images need none.
    """

    def __init__(
        self,
        path: str,
        skipped: BadSampleCounter,
        *,
        cache: pathlib.Path,
        captions: bool = True,
        caption_key: str = DEFAULT_KEY,
    ) -> None:
        self._storage = Storage(path)
        found = self._storage.find()
        files = {n: details for n, details in found.items() if n.lower().endswith(".tar")}
        others = [n for n in found if n.lower().endswith(COMPRESSED)]
        if not files:
            got = f"{len(others)} compressed tars and no .tar files" if others else "no .tar files"
            raise InputError(f"data.path: got {got} in {path}, expected at least one .tar")
        if others:
            _warn(path, f"{len(others)} compressed tars such as {others[0]} are not read")
        self._captions, self._key = captions, caption_key
        names = list(files)
        marks = [
            fingerprint(path, name, version(files[name]), caption_key, INDEX_VERSION)
            for name in names
        ]
        with ThreadPoolExecutor(READERS) as pool:
            listed = list(pool.map(lambda n, m: self._listed(n, cache / f"{m}.npz"), names, marks))
        for name, listing in zip(names, listed, strict=True):
            self._count(f"{path}: {name}", listing, skipped)
        several = sum(listing.several_captions for listing in listed) if captions else 0
        if several:
            text, other = TEXT_FILES
            _warn(
                path, f"{several} samples have several captions; KEY{text} counts, not KEY{other}"
            )
        if several := sum(listing.several_images for listing in listed):
            _warn(path, f"{several} samples have several images; the last counts")
        self._names = names
        tables = [_usable(listing, captions) for listing in listed]
        self._starts = np.cumsum([0, *(len(table) for table in tables)])
        self._members = np.concatenate(tables)
        # Of what lies where, not of dates: every machine may have a copy of its own.
        self.fingerprint = fingerprint(
            str(captions),
            *(
                f"{name} {hashlib.sha256(t[:, :4].tobytes()).hexdigest()}"
                for name, t in zip(names, tables, strict=True)
            ),
        )

    def _listed(self, name: str, index_file: pathlib.Path) -> TarIndex:
        if index_file.exists():
            with np.load(index_file) as table:
                members, *counts = (table[field] for field in TarIndex._fields)
            return TarIndex(members, *(count.item() for count in counts))

        def read() -> TarIndex:
            with self._storage.open(name) as file:
                return _list(file, self._key)

        try:
            listing = self._storage.retry(read)
        except (
            BadSampleError
        ) as error:  # not a fault of the tar's, perhaps gone at the next attempt
            raise InputError(f"{name}: got {error}, expected a tar to read") from None
        with atomic_file(index_file) as temporary, temporary.open("wb") as file:
            np.savez(file, **listing._asdict())
        return listing

    def _count(self, name: str, listing: TarIndex, skipped: BadSampleCounter) -> None:
        wrong = {NO_IMAGE: listing.without_image, TRUNCATED: int(listing.truncated)}
        if self._captions:
            wrong |= {NO_CAPTION: listing.without_caption, EMPTY: listing.empty}
        usable = len(_usable(listing, self._captions))
        skipped.seen(usable + sum(wrong.values()))
        for reason, number in wrong.items():
            if number:
                skipped.broken(reason, number, where=name if reason == TRUNCATED else "")

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Record:
        begin, end, text, text_end, is_json = self._members[index].tolist()
        if not self._captions:
            return {"image": self._read(index, begin, end), "caption": ""}
        first = min(begin, text)
        data = self._read(index, first, max(end, text_end))
        source = f"{self._storage.path}: {self._names[self._tar(index)]}, byte {text}"
        caption = data[text - first : text_end - first]
        caption = read_caption(caption, source, self._key, is_json=bool(is_json))
        return {"image": data[begin - first : end - first], "caption": caption}

    def head(self, index: int, size: int) -> bytes:
        """The first `size` bytes of an image."""
        begin, end = self._members[index, :2].tolist()
        return self._read(index, begin, min(end, begin + size))

    def _read(self, index: int, start: int, end: int) -> bytes:
        return self._storage.read(self._names[self._tar(index)], start, end)

    def _tar(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1


def _warn(path: str, message: str) -> None:
    warnings.warn(f"data.path: {path}: {message}", stacklevel=3)


def _usable(listing: TarIndex, captions: bool) -> Int[NDArray, "n 5"]:
    table = listing.members
    return table[table[:, 3] > table[:, 2]] if captions else table


def _list(file: Any, key: str) -> TarIndex:
    """The listing of an opened tar, up to where it breaks off; `key` is that of JSON captions."""
    members: list[tuple[int, ...]] = []
    counts: Counter[str] = Counter()
    walk = _TarReader(file)
    for sample in walk.samples():
        counts["images"] += len(sample.images) > 1
        counts["captions"] += sum(kind in sample.captions for kind in TEXT_FILES) > 1
        if not sample.images:
            counts["without"] += 1
            continue
        kind = next((kind for kind in CAPTION_FILES if kind in sample.captions), None)
        span = (-1, -1) if kind is None else sample.captions[kind]
        if kind == JSON_FILE and not walk.has_caption(span, key):
            span = (-1, -1)
        members.append((*sample.images[-1], *span, kind == JSON_FILE))
    table = np.array(members, np.int64).reshape(-1, 5)
    has_caption, empty = table[:, 2] >= 0, table[:, 2] == table[:, 3]
    return TarIndex(
        members=table,
        without_caption=int((~has_caption).sum()),
        empty=int((has_caption & empty).sum()),
        without_image=counts["without"],
        several_images=counts["images"],
        several_captions=counts["captions"],
        truncated=walk.truncated,
    )


Span = tuple[int, int]


class _Sample(NamedTuple):
    """Where the images and, by extension, the captions of a sample lie."""

    images: list[Span]
    captions: dict[str, Span]


class _TarReader:
    """The samples of a tar: its consecutive members that share what precedes the first dot."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.truncated = False

    def samples(self) -> Iterator[_Sample]:
        """The samples, up to where the tar breaks off."""
        key, sample = None, _Sample([], {})
        for name, span in self._members():
            folder, base = posixpath.split(name)
            stem, _, extension = base.partition(".")
            if posixpath.join(folder, stem) != key:
                if key is not None:
                    yield sample
                key, sample = posixpath.join(folder, stem), _Sample([], {})
            kind = f".{extension.lower()}"
            if kind in EXTENSIONS:
                sample.images.append(span)
            elif kind in CAPTION_FILES:
                sample.captions[kind] = span
        # The last sample of a truncated tar may lack members that it had.
        if key is not None and not self.truncated:
            yield sample

    def has_caption(self, span: Span, key: str) -> bool:
        """Whether the JSON object there has a caption."""
        self._file.seek(span[0])
        try:
            return bool(read_caption(self._file.read(span[1] - span[0]), "", key, is_json=True))
        except BadSampleError as error:
            return str(error) != NO_CAPTION  # what else is wrong is counted when it is read

    def _members(self) -> Iterator[tuple[str, Span]]:
        size = self._size()
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                headers: Any = tar
                for member in tar:
                    headers.members = []  # it would keep all of them in memory
                    end = member.offset_data + member.size
                    if end > size:
                        self.truncated = True
                        return
                    if member.isreg():
                        yield member.name, (member.offset_data, end)
                # What ends a tar is a block of zeros; without it, it ends too early.
                self.truncated = not self._zeros_at(tar.offset, size)
        except (tarfile.TarError, EOFError, zlib.error, ValueError):
            self.truncated = True

    def _size(self) -> int:
        self._file.seek(0, os.SEEK_END)
        size = self._file.tell()
        self._file.seek(0)
        return size

    def _zeros_at(self, offset: int, size: int) -> bool:
        if offset + tarfile.BLOCKSIZE > size:
            return False
        self._file.seek(offset)
        return not any(self._file.read(tarfile.BLOCKSIZE))
