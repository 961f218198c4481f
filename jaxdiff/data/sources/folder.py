"""Image folders: captions in tables (Hugging Face's imagefolder) or in a file beside each image.

Tables are `metadata.jsonl`, one object a line, and `metadata.csv`: "file_name", relative to their
own folder, and the caption under another key, "text" by default. Without any table NAME.txt,
NAME.caption or NAME.json is the caption of NAME.png.
"""

import csv
import io
import json
import posixpath
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.sources import Record
from jaxdiff.data.sources.captions import (
    CAPTION_FILES,
    DEFAULT_KEY,
    JSON_FILE,
    NO_CAPTION,
    OTHER_KEYS,
    caption_of,
    read_caption,
)
from jaxdiff.data.sources.storage import MISSING, Storage, fingerprint

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif"),
    *(".bmp", ".tif", ".tiff", ".gif"),
)
TABLES = ("metadata.jsonl", "metadata.csv")
NO_IMAGE, BAD_LINE = "without image", "bad metadata line"
FILE_NAME = "file_name"

Row = Mapping[str, Any] | None  # None where a line is none


class FolderSource:
    """The images below a folder, sorted by path; without `captions` none is asked for.

    Files that are not read, and captions that are not the ones that count, are a warning.
    """

    def __init__(
        self,
        path: str,
        skipped: BadSampleCounter,
        *,
        captions: bool = True,
        caption_key: str = DEFAULT_KEY,
    ) -> None:
        self._storage, self._key = Storage(path), caption_key
        files = self._storage.find()
        images = [name for name in files if _extension(name) in EXTENSIONS]
        tables = [name for name in files if posixpath.basename(name) in TABLES]
        beside = _caption_files(files)
        self._warn_unread(files, set(images), captions)
        # The caption itself, or the file that has it.
        self._items: list[tuple[str, str]] = []
        self._inline = bool(tables) or not captions
        if not captions:
            self._items = [(name, "") for name in images]
            skipped.seen(len(images))
        elif tables:
            self._list_tables(tables, files, skipped)
            named = {name for name, _ in self._items}
            self._count(sum(n not in named for n in images), NO_CAPTION, skipped)
            self._warn_several({n: [tables[0], *beside.get(_stem(n), ())] for n in images})
        else:
            found = {name: beside[_stem(name)] for name in images if _stem(name) in beside}
            self._items = [(name, texts[0]) for name, texts in found.items()]
            skipped.seen(len(self._items))
            self._count(len(images) - len(self._items), NO_CAPTION, skipped)
            self._warn_several(found)
        self.fingerprint = fingerprint(
            *(f"{name}\n{text}\n{files[name]['size']}" for name, text in self._items)
        )

    @staticmethod
    def _count(number: int, reason: str, skipped: BadSampleCounter) -> None:
        skipped.seen(number)
        if number:
            skipped.broken(reason, number)

    def _warn_unread(self, files: Mapping[str, Any], images: set[str], captions: bool) -> None:
        """Say which files are no images and, where `captions` are asked for, not those of one."""
        stems = {_stem(name) for name in images}

        def is_caption(name: str) -> bool:
            if posixpath.basename(name) in TABLES:
                return True
            return _extension(name) in CAPTION_FILES and (not captions or _stem(name) in stems)

        unread = [name for name in files if name not in images and not is_caption(name)]
        kinds = Counter(_extension(name) or posixpath.basename(name) for name in unread)
        if kinds:
            listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
            more = ", ..." if len(kinds) > 8 else ""
            warnings.warn(
                f"data.path: {self._storage.path}: {len(unread)} files are neither images nor "
                f"captions of one and are not read ({listed}{more})",
                stacklevel=3,
            )

    def _warn_several(self, captions: Mapping[str, list[str]]) -> None:
        """Say of how many images only the first of several captions counts."""
        # A JSON file beside a caption has other data about the image.
        texts = {n: [t for t in each if not t.endswith(JSON_FILE)] for n, each in captions.items()}
        several = [(name, each) for name, each in texts.items() if len(each) > 1]
        if several:
            name, (first, *others) = several[0]
            warnings.warn(
                f"data.path: {self._storage.path}: {len(several)} images have several captions; of "
                f"{name} that in {first} counts, not {' or '.join(others)}",
                stacklevel=3,
            )

    def _list_tables(
        self, tables: list[str], files: Mapping[str, Any], skipped: BadSampleCounter
    ) -> None:
        folders = Counter(map(posixpath.dirname, tables))
        for folder, count in folders.items():
            if count > 1:
                raise InputError(
                    f"data.path: got {' and '.join(TABLES)} in "
                    f"{posixpath.join(self._storage.path, folder)}, expected one of them"
                )
        reasons: Counter[str] = Counter()
        keys: Counter[str] = Counter()
        for table in tables:
            source = f"{self._storage.path}: {table}"
            for row in _rows(self._storage.text(table), source):
                keys.update(name for name in (DEFAULT_KEY, *OTHER_KEYS) if row and row.get(name))
                try:
                    name, caption = _entry(row, posixpath.dirname(table), self._key)
                    if name not in files:
                        raise BadSampleError(MISSING)
                    self._items.append((name, caption))
                except BadSampleError as error:
                    reasons[str(error)] += 1
        if self._key == DEFAULT_KEY and keys[DEFAULT_KEY] and len(keys) > 1:
            others = " and ".join(name for name in OTHER_KEYS if keys[name])
            warnings.warn(
                f"data.path: {self._storage.path}: {tables[0]} has {others} beside {DEFAULT_KEY}, "
                f"which is not read (data.caption_key chooses)",
                stacklevel=3,
            )
        skipped.seen(len(self._items) + reasons.total())
        for reason, number in sorted(reasons.items()):
            skipped.broken(reason, number)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        name, text = self._items[index]
        return {"image": self._storage.read(name), "caption": self._caption(text)}

    def _caption(self, text: str) -> str:
        if self._inline:
            return text
        data, is_json = self._storage.read(text), _extension(text) == JSON_FILE
        source = posixpath.join(self._storage.path, text)
        return read_caption(data, source, self._key, is_json=is_json)

    def head(self, index: int, size: int) -> bytes:
        """The first `size` bytes of an image."""
        return self._storage.read(self._items[index][0], 0, size)


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _caption_files(files: Mapping[str, Any]) -> dict[str, list[str]]:
    """The caption files of each stem, in the order in which they count."""
    found: dict[str, list[str]] = {}
    for kind in CAPTION_FILES:
        for name in files:
            if _extension(name) == kind:
                found.setdefault(_stem(name), []).append(name)
    return found


def _rows(text: str, source: str) -> Iterator[Row]:
    """The rows of a table; InputError for a CSV without a column of files."""
    if source.endswith(".csv"):
        yield from _csv_rows(text, source)
        return
    for line in text.split("\n"):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def _csv_rows(text: str, source: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    columns = list(reader.fieldnames or ())
    if FILE_NAME not in columns:
        listed = ", ".join(columns) or "none"
        raise InputError(f"{source}: got the columns {listed}, expected {FILE_NAME!r} among them")
    try:
        for row in reader:
            # A row of too many cells has a caption with a comma and no quotes around it.
            yield None if None in row or None in row.values() else row
    except csv.Error as error:
        line = reader.reader.line_num
        raise InputError(f"{source}:{line}: got {error}, expected CSV") from None


def _entry(row: Row, folder: str, key: str) -> tuple[str, str]:
    """File and caption of a row of the table in `folder`; BadSampleError if it has none."""
    name = None if row is None else row.get(FILE_NAME)
    if row is None or not isinstance(name, str):
        raise BadSampleError(BAD_LINE)
    # An image lies in the folder: a path could lead anywhere on the machine.
    path = posixpath.normpath(posixpath.join(folder, name))
    if path.startswith(("../", "/")):
        raise BadSampleError(BAD_LINE)
    return path, caption_of(row, key)
