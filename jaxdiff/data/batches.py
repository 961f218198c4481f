"""Endless batches from a grain source, sharded by process and resumable at any batch."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray, UInt8
from jaxdiff.core.validate import in_range, positive
from jaxdiff.data.bad_samples import BadSampleCounter
from jaxdiff.data.texts import MASK_COLUMNS, POOLED_COLUMN, STATE_COLUMNS, CaptionTokenizer
from jaxdiff.data.tokenizer import TextTokenizer, tokenize

Item = Mapping[str, Any]
Batch = dict[str, np.ndarray]

# Latents, SDXL's time ids, and text embeddings.
OPTIONAL_FIELDS = ("mean", "logvar", "time_ids", *STATE_COLUMNS, *MASK_COLUMNS, POOLED_COLUMN)
READ_AHEAD = 2  # batches prepared while the device computes
ENDLESS = 1 << 52  # items: no training reads as many, and floats count them exactly, as grain does


def normalize_images(images: UInt8[NDArray, "..."]) -> Float[NDArray, "..."]:
    """Bytes 0 to 255 as float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def collate(
    items: Sequence[Item], tokenizer: TextTokenizer | CaptionTokenizer | None = None
) -> Batch:
    """Items with "image" and "caption" as arrays "image" (b, h, w, 3) in [-1, 1] and "ids" (b, n).

    Without a tokenizer there are no "ids"; `CaptionTokenizer` names its own. Where items have
    arrays in OPTIONAL_FIELDS in place of or beside "image", so has the batch.
    """
    batch: Batch = {}
    if "image" in items[0]:
        batch["image"] = normalize_images(np.stack([item["image"] for item in items]))
    for name in (name for name in OPTIONAL_FIELDS if name in items[0]):
        batch[name] = np.stack([item[name] for item in items])
    captions = [item["caption"] for item in items] if tokenizer is not None else []
    if isinstance(tokenizer, CaptionTokenizer):
        return batch | tokenizer(captions)
    return batch if tokenizer is None else batch | {"ids": tokenize(tokenizer, captions)}


def batches(
    source: Any,
    *,
    batch_size: int,
    tokenizer: TextTokenizer | CaptionTokenizer | None = None,
    transform: Callable[[Sequence[Item]], Batch] | None = None,
    seed: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator over this process's share of batches of `batch_size` items in all.

    `transform` makes a batch of a list of items (default: `collate` with `tokenizer`). `seed`
    None keeps the source's order, right for a source whose items are independent draws; a number
    shuffles anew in every epoch. The n-th global batch is the same for any number of processes,
    each holding a contiguous part of it, and for any number of threads.

    `get_state` returns a small JSON mapping after which `set_state` continues exactly; `close`
    stops the reading threads (they also end with the interpreter). Raises InputError if the
    processes cannot share a batch evenly or the source is smaller than a batch.
    """
    positive("batch_size", batch_size)
    positive("process_count", process_count)
    in_range("process_index", process_index, 0, process_count - 1)
    in_range("threads", threads, 0, 64)
    if batch_size % process_count:
        raise InputError(f"batch_size: got {batch_size}, expected a multiple of {process_count}")
    if len(source) < batch_size:
        raise InputError(f"source: got {len(source)} items, expected at least {batch_size}")
    data = grain.MapDataset.source(source)
    if seed is not None:
        data = data.seed(seed).shuffle()
    # Whole global batches only, so that an epoch ends at the same batch for every process.
    whole = len(source) // batch_size * batch_size
    data = data[:whole].repeat(max(1, ENDLESS // whole))
    assemble = transform or functools.partial(collate, tokenizer=tokenizer)
    data = data.batch(batch_size // process_count, batch_fn=assemble)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(READ_AHEAD, threads))
    return iter(data[process_index::process_count].to_iter_dataset(options))


class BatchStream:
    """Training batches, with counts of bad samples and a fingerprint of the data."""

    def __init__(
        self, iterator: Any, skipped: BadSampleCounter, identity: Mapping[str, str]
    ) -> None:
        self._iterator, self._skipped, self.identity = iterator, skipped, identity

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> Any:
        """The state as JSON values, the same for any number of processes."""
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        """Continue from a state that `get_state` returned."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """Stop the reading threads."""
        self._iterator.close()

    def counts(self) -> dict[str, float]:
        """For the log: samples that this process has skipped since it started, by reason."""
        counts = self._skipped.counts()
        return {f"skipped_{name.replace(' ', '_')}": float(n) for name, n in counts.items()}
