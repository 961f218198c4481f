"""Webdataset tars as img2dataset writes them: KEY.jpg, KEY.txt and KEY.json behind one another.

Every tar is read once to list where its members lie; the lists are kept in a cache folder. After
that any sample is one read of a few hundred kilobytes, on a disk as in a bucket.
"""

import hashlib
import os
import pathlib
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.core.aliases import TAR_INDEX, rename_keys
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Int, NDArray
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.sources import Record
from jaxdiff.data.sources.folder import EMPTY, EXTENSIONS, NO_CAPTION, NO_IMAGE, decode_caption
from jaxdiff.data.sources.storage import Storage, fingerprint, version

READERS = 8  # tars that are listed at the same time
TRUNCATED = "truncated or broken tar"


class TarIndex(NamedTuple):
    """Where the samples of a tar lie, and what is wrong with others."""

    members: Int[NDArray, "n 4"]  # begin and end of the image, begin and end of the caption
    without_caption: int
    empty: int
    without_image: int
    truncated: bool


class TarSource:
    """The samples of all .tar files below a folder, in the order of the files and in them.

    `cache` is a local folder. Without `captions` images need none.
    """

    def __init__(
        self, path: str, skipped: BadSampleCounter, *, cache: pathlib.Path, captions: bool = True
    ) -> None:
        self._storage = Storage(path)
        files = {n: d for n, d in self._storage.find().items() if n.endswith(".tar")}
        if not files:
            raise InputError(f"data.path: got {path} without .tar files, expected at least one")
        self._captions = captions
        names = list(files)
        marks = [fingerprint(path, name, version(files[name])) for name in names]
        with ThreadPoolExecutor(READERS) as pool:
            listed = list(pool.map(lambda n, m: self._listed(n, cache / f"{m}.npz"), names, marks))
        for name, listing in zip(names, listed, strict=True):
            self._count(f"{path}: {name}", listing, skipped)
        self._names = names
        tables = [_usable(listing, captions) for listing in listed]
        self._starts = np.cumsum([0, *(len(table) for table in tables)])
        self._members = np.concatenate(tables)
        # Of what lies where, not of dates: every machine may have a copy of its own.
        self.fingerprint = fingerprint(
            str(captions),
            *(
                f"{name} {hashlib.sha256(t.tobytes()).hexdigest()}"
                for name, t in zip(names, tables, strict=True)
            ),
        )

    def _listed(self, name: str, index_file: pathlib.Path) -> TarIndex:
        if index_file.exists():
            with np.load(index_file) as table:
                fields = rename_keys(table, TAR_INDEX)
                members, *counts = (fields[field] for field in TarIndex._fields)
            return TarIndex(members, *(count.item() for count in counts))

        def read() -> TarIndex:
            with self._storage.open(name) as file:
                return _list(file)

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
        begin, end, text, text_end = self._members[index].tolist()
        if not self._captions:
            return {"image": self._read(index, begin, end), "caption": ""}
        first = min(begin, text)
        data = self._read(index, first, max(end, text_end))
        caption = decode_caption(data[text - first : text_end - first])
        return {"image": data[begin - first : end - first], "caption": caption}

    def head(self, index: int, size: int) -> bytes:
        """The first `size` bytes of an image."""
        begin, end = self._members[index, :2].tolist()
        return self._read(index, begin, min(end, begin + size))

    def _read(self, index: int, start: int, end: int) -> bytes:
        tar = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._storage.read(self._names[tar], start, end)


def _usable(listing: TarIndex, captions: bool) -> Int[NDArray, "n 4"]:
    table = listing.members
    return table[table[:, 3] > table[:, 2]] if captions else table


def _list(file: Any) -> TarIndex:
    """The listing of an opened tar, up to where it breaks off."""
    members: list[tuple[int, int, int, int]] = []
    without_image = 0
    walk = _TarReader(file)
    for image, text in walk.samples():
        if image is None:
            without_image += 1
        else:
            members.append(image + (text or (-1, -1)))
    table = np.array(members, np.int64).reshape(-1, 4)
    has_caption, empty = table[:, 2] >= 0, table[:, 2] == table[:, 3]
    return TarIndex(
        table,
        int((~has_caption).sum()),
        int((has_caption & empty).sum()),
        without_image,
        walk.truncated,
    )


Span = tuple[int, int]


class _TarReader:
    """The samples of a tar: its consecutive members that share what precedes the first dot."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.truncated = False

    def samples(self) -> Iterator[tuple[Span | None, Span | None]]:
        """Where image and caption of each sample lie, None for what it has not."""
        key, parts = "", {}
        for name, span in self._members():
            folder, base = posixpath.split(name)
            stem, _, extension = base.partition(".")
            if posixpath.join(folder, stem) != key:
                if parts:
                    yield parts.get("image"), parts.get("text")
                key, parts = posixpath.join(folder, stem), {}
            if f".{extension.lower()}" in EXTENSIONS:
                parts["image"] = span
            elif extension.lower() == "txt":
                parts["text"] = span
            else:
                parts["rest"] = span
        # The last sample of a truncated tar may lack members that it had.
        if parts and not self.truncated:
            yield parts.get("image"), parts.get("text")

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
