"""Latents that were encoded once: ArrayRecord shards and a latents.json that says what made them.

A record is a msgpack map: "mean" and "logvar" of the VAE's distribution (unscaled, so that every
epoch draws anew from it), "caption", and "time_ids" as `data.preprocessing` has them. All records
of a shard have one size. With cached text embeddings it has those too, by the names in
`data.texts`, and a file of one record has those of the null caption.
"""

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxdiff.core.configs import from_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.core.text import decode_text
from jaxdiff.core.types import DTYPES, Int, NDArray
from jaxdiff.core.validate import one_of
from jaxdiff.data.bad_samples import BadSampleError
from jaxdiff.data.batches import Item
from jaxdiff.data.buckets import Size
from jaxdiff.data.sampling_order import SamplePosition
from jaxdiff.data.sources.records import (
    BROKEN_RECORD,
    EXTENSION,
    RecordFiles,
    is_readable,
    parse_record,
)
from jaxdiff.data.sources.storage import fingerprint
from jaxdiff.data.texts import MASK_COLUMNS, POOLED_COLUMN, STATE_COLUMNS

DESCRIPTION = "latents.json"
NULL_CAPTION_FILE = f"null{EXTENSION}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentCacheInfo:
    """What latents.json says: what was encoded, by what, into which shards."""

    vae: str  # digest of the weights that encoded
    source: str  # fingerprint of the images, their sizes and how they were prepared
    resolution: int  # side in pixels of the square that all sizes have about the area of
    downscale: int  # pixels per latent, along a side
    channels: int
    dtype: str  # in which mean and logvar are stored
    heights: tuple[int, ...]  # in pixels, of the images of each shard
    widths: tuple[int, ...]
    items: tuple[int, ...]  # images meant for each shard; broken ones are missing from it
    # Of each text encoder that has read the captions, none where they are stored alone: digests of
    # its weights and of its tokenizer, how many states it has of a text, and how wide they are, 0
    # where the model takes none of them.
    text_encoders: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    tokenizers: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    tokens: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    state_widths: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    # whether the mask of the tokens that are text is stored too; empty: of no text encoder
    masked: tuple[bool, ...] = dataclasses.field(default=(), repr=False)
    # of the pooled embeddings of all text encoders side by side; 0: none
    pooled_width: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        if not len(self.heights) == len(self.widths) == len(self.items):
            raise InputError(
                f"shards: got {len(self.heights)} heights, {len(self.widths)} widths and "
                f"{len(self.items)} items, expected as many of each"
            )

        texts = (self.text_encoders, self.tokenizers, self.tokens, self.state_widths)
        if len({len(each) for each in texts}) > 1 or len(self.tokens) > len(STATE_COLUMNS):
            raise InputError(
                f"text_encoders: got {len(self.text_encoders)}, {len(self.tokenizers)} tokenizers, "
                f"{len(self.tokens)} tokens and {len(self.state_widths)} state_widths, "
                f"expected as many of each, at most {len(STATE_COLUMNS)}"
            )
        if self.masked and len(self.masked) != len(self.tokens):
            raise InputError(f"masked: got {len(self.masked)}, expected {len(self.tokens)} or none")

    @property
    def text_embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the text embeddings of one caption, by name."""
        sizes = zip(STATE_COLUMNS, self.tokens, self.state_widths, strict=False)
        shapes: dict[str, tuple[int, ...]] = {name: (n, d) for name, n, d in sizes if d}
        masks = zip(MASK_COLUMNS, self.tokens, self.masked, strict=False)
        shapes |= {name: (n,) for name, n, stored in masks if stored}
        return shapes | ({POOLED_COLUMN: (self.pooled_width,)} if self.pooled_width else {})

    @property
    def identity(self) -> str:
        """What fingerprints are made of: the fields, under the title that old workdirs have."""
        return repr(self).replace(type(self).__name__, "Latents", 1)

    def shard(self, number: int) -> str:
        """The file name of a shard."""
        return f"latents-{number:05d}-of-{len(self.items):05d}{EXTENSION}"

    def shape(self, number: int) -> tuple[int, int, int]:
        """Height, width and channels of the latents in a shard."""
        sides = (self.heights[number], self.widths[number])
        height, width = (side // self.downscale for side in sides)
        return height, width, self.channels


def read_description(folder: pathlib.Path) -> LatentCacheInfo:
    """The latents.json of a folder."""
    path = folder / DESCRIPTION
    try:
        mapping = json.loads(decode_text(path.read_bytes(), str(path)))
    except (OSError, ValueError):
        wanted = f"a folder with the {DESCRIPTION} of jaxdiff cache-latents"
        raise InputError(f"data.path: got {folder}, expected {wanted}") from None
    return from_mapping(LatentCacheInfo, mapping, source=str(path))


def array_of(record: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...]) -> NDArray:
    """An array of a record; ValueError for one of another size."""
    return np.frombuffer(record[name], DTYPES[dtype]).reshape(shape)


class LatentSource:
    """Random access to the latents in a local folder, all of whose shards must be there.

    Items are {"mean", "logvar": float32 (h, w, c), "caption", "time_ids"}, and text
    embeddings as they are stored.
    """

    def __init__(self, path: str) -> None:
        folder = pathlib.Path(path)
        self.description = read_description(folder)
        count = len(self.description.items)
        paths = [folder / self.description.shard(i) for i in range(count)]
        there = [path for path in paths if path.is_file()]
        if not there or len(there) < count:
            raise InputError(
                f"data.path: got {len(there)} of {count} shards in {folder}, expected all: "
                "the same cache-latents command writes the others"
            )
        for shard in there:
            if not is_readable(shard):
                raise InputError(f"{shard}: got a broken file, expected a shard (delete it)")
        lengths = [len(RecordFiles([shard])) for shard in there]
        self._files = RecordFiles(there)
        self._starts = np.cumsum([0, *lengths])
        # What a shard has was settled when it was written, broken images left out.
        text_hashes = self.description.text_encoders + self.description.tokenizers
        self.fingerprint = fingerprint(self.description.identity, repr(lengths), *text_hashes)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def groups(self, batch_size: int) -> list[tuple[Size, Int[NDArray, "_"]]]:
        """The items of each size of which there are enough for a batch; others are warned about.

        If no size has enough, those of the most frequent one.
        """
        found: dict[Size, list[NDArray]] = {}
        for i, size in enumerate(self._sizes()):
            found.setdefault(size, []).append(np.arange(self._starts[i], self._starts[i + 1]))
        joined = {size: np.concatenate(parts) for size, parts in sorted(found.items())}
        enough = min(batch_size, max(map(len, joined.values()), default=0))
        for size, items in joined.items():
            if len(items) < enough:
                warnings.warn(
                    f"data: {len(items)} latents of {size[0]}x{size[1]} pixels are not used, "
                    "because they are fewer than a batch",
                    stacklevel=2,
                )
        return [(size, items) for size, items in joined.items() if len(items) >= max(enough, 1)]

    def _sizes(self) -> Iterator[Size]:
        yield from zip(self.description.heights, self.description.widths, strict=True)

    def __getitem__(self, index: int) -> Item:
        record = parse_record(self._files[index])
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        described = self.description
        shape, dtype = described.shape(shard), described.dtype
        try:
            arrays = {n: array_of(record, n, dtype, shape) for n in ("mean", "logvar")}
            text_embeddings = {
                n: array_of(record, n, dtype, size)
                for n, size in described.text_embedding_shapes.items()
            }
            time_ids = np.array(record["time_ids"], np.int32).reshape(6)
            wide = {name: array.astype(np.float32) for name, array in arrays.items()}
            return {
                **wide,
                **text_embeddings,
                "caption": str(record["caption"]),
                "time_ids": time_ids,
            }
        except (KeyError, ValueError, TypeError):
            raise BadSampleError(BROKEN_RECORD) from None

    def make(self, index: int, place: SamplePosition) -> Item:
        """Item `index`; where it stands changes nothing."""
        del place
        return self[index]
