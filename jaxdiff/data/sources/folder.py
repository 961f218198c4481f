"""Image folders: captions in metadata.jsonl (Hugging Face's imagefolder) or in a .txt beside each.

`metadata.jsonl` has one object a line: "file_name", relative to its own folder, and the caption
under another key, "text" by default. Without such a file NAME.txt is the caption of NAME.png.
"""

import json
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.sources import Record
from jaxdiff.data.sources.storage import MISSING, Storage, fingerprint

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
METADATA = "metadata.jsonl"
NO_CAPTION, EMPTY, NO_IMAGE = "without caption", "empty caption", "without image"
BAD_LINE = "bad metadata line"


def clean_caption(caption: str) -> str:
    """`caption` without blanks around it; BadSampleError if nothing is left."""
    stripped = caption.strip()
    if not stripped:
        raise BadSampleError(EMPTY)
    return stripped


def decode_caption(data: bytes) -> str:
    """A caption file's text; BadSampleError if it is not UTF-8 or says nothing."""
    try:
        return clean_caption(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadSampleError("caption that is not UTF-8") from None


class FolderSource:
    """The images below a folder, sorted by path; without `captions` none is asked for."""

    def __init__(
        self,
        path: str,
        skipped: BadSampleCounter,
        *,
        captions: bool = True,
        caption_key: str = "text",
    ) -> None:
        self._storage = Storage(path)
        files = self._storage.find()
        images = [n for n in files if posixpath.splitext(n)[1].lower() in EXTENSIONS]
        tables = [name for name in files if posixpath.basename(name) == METADATA]
        # The caption itself, or the file that has it.
        self._items: list[tuple[str, str]] = []
        self._inline = bool(tables) or not captions
        if not captions:
            self._items = [(name, "") for name in images]
            skipped.seen(len(images))
        elif tables:
            self._list_tables(tables, files, skipped, caption_key)
            named = {name for name, _ in self._items}
            self._count(sum(n not in named for n in images), NO_CAPTION, skipped)
        else:
            beside = {name: posixpath.splitext(name)[0] + ".txt" for name in images}
            self._items = [(name, text) for name, text in beside.items() if text in files]
            skipped.seen(len(self._items))
            self._count(len(images) - len(self._items), NO_CAPTION, skipped)
        self.fingerprint = fingerprint(
            *(f"{name}\n{text}\n{files[name]['size']}" for name, text in self._items)
        )

    @staticmethod
    def _count(number: int, reason: str, skipped: BadSampleCounter) -> None:
        skipped.seen(number)
        if number:
            skipped.broken(reason, number)

    def _list_tables(
        self, tables: list[str], files: Mapping[str, Any], skipped: BadSampleCounter, key: str
    ) -> None:
        reasons: list[str] = []
        for table in tables:
            for found in _lines(self._storage.text(table), posixpath.dirname(table), key):
                if isinstance(found, str):
                    reasons.append(found)
                elif found[0] not in files:
                    reasons.append(MISSING)
                else:
                    self._items.append(found)
        skipped.seen(len(self._items) + len(reasons))
        for reason in sorted(set(reasons)):
            skipped.broken(reason, reasons.count(reason))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        name, text = self._items[index]
        caption = text if self._inline else decode_caption(self._storage.read(text))
        return {"image": self._storage.read(name), "caption": caption}

    def head(self, index: int, size: int) -> bytes:
        """The first `size` bytes of an image."""
        return self._storage.read(self._items[index][0], 0, size)


def _lines(text: str, folder: str, key: str) -> Iterator[tuple[str, str] | str]:
    """File and caption of each line, or what is wrong with it."""
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row.get(key)
            # An image lies in the folder: a path could lead anywhere on the machine.
            path = posixpath.normpath(posixpath.join(folder, name))
            if path.startswith(("../", "/")):
                raise ValueError
            yield (path, clean_caption(caption)) if isinstance(caption, str) else NO_CAPTION
        except BadSampleError as error:
            yield str(error)
        except (ValueError, TypeError, KeyError, AttributeError):
            yield BAD_LINE
