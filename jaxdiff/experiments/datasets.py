"""Data sets of stored images and latents, from a DataConfig."""

import contextlib
import hashlib
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Int, NDArray
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.buckets import Size, assign_buckets, bucket_sizes, read_image_sizes
from jaxdiff.data.latents import DESCRIPTION, LatentSource
from jaxdiff.data.samples import MapDataset, make_transform
from jaxdiff.data.sampling_order import BlockShuffleSampler, IndexSampler, validation_indices
from jaxdiff.data.sources import BlockSource, ImageSource
from jaxdiff.data.sources.folder import FolderSource
from jaxdiff.data.sources.hub import HubSource
from jaxdiff.data.sources.parquet import ParquetSource
from jaxdiff.data.sources.records import RecordSource
from jaxdiff.data.sources.storage import fingerprint
from jaxdiff.data.sources.tars import TarSource
from jaxdiff.training.config import DataConfig

Items = Int[NDArray, "_"]
Groups = list[tuple[Size, Items]]
VALIDATION_BLOCKS = 8  # blocks of the validation split, for data stored in blocks


class Dataset(NamedTuple):
    """An open data set: training samples in their order, and the validation split."""

    training: MapDataset
    validation: MapDataset
    validation_size: int  # items of the validation split, which is one batch
    skipped: BadSampleCounter  # bad samples of `training`
    fingerprint: str


def cache_folder(config: DataConfig) -> pathlib.Path:
    """The folder of indices and image sizes."""
    if config.cache_dir is not None:
        return pathlib.Path(config.cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jaxdiff" / "data"


def open_image_source(
    config: DataConfig, skipped: BadSampleCounter, *, captions: bool
) -> ImageSource:
    """The source of images of a kind in IMAGE_KINDS; its bad listings are counted in `skipped`."""
    if (pathlib.Path(str(config.path)) / DESCRIPTION).is_file():
        raise InputError(f"data.kind: got {config.kind} for {config.path}, expected latents")
    return IMAGE_SOURCES[config.kind](config, skipped, captions)


def _table_options(config: DataConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("split", "image_key", "caption_key")}


# What opens each kind of stored images in IMAGE_KINDS.
IMAGE_SOURCES: dict[str, Callable[[DataConfig, BadSampleCounter, bool], ImageSource]] = {
    "folder": lambda config, skipped, captions: FolderSource(
        str(config.path), skipped, captions=captions, caption_key=config.caption_key
    ),
    "tars": lambda config, skipped, captions: TarSource(
        str(config.path),
        skipped,
        cache=cache_folder(config),
        captions=captions,
        caption_key=config.caption_key,
    ),
    "records": lambda config, skipped, captions: RecordSource(
        str(config.path), skipped, captions=captions
    ),
    "hub": lambda config, skipped, captions: HubSource(
        str(config.path), captions=captions, **_table_options(config)
    ),
    "parquet": lambda config, skipped, captions: ParquetSource(
        str(config.path),
        skipped,
        cache=cache_folder(config),
        captions=captions,
        **_table_options(config),
    ),
}


def bucket_items(
    config: DataConfig, source: ImageSource, min_bucket_size: int
) -> tuple[Groups, str]:
    """The items of each bucket, at least `min_bucket_size`, and a fingerprint of the buckets.

    For a single bucket no image sizes are read.
    """
    side = config.resolution or 0
    sizes = bucket_sizes(
        side, multiple=config.bucket_multiple, max_aspect_ratio=config.max_aspect_ratio
    )
    if len(sizes) == 1:
        return [(sizes[0], np.arange(len(source)))], fingerprint(source.fingerprint, str(side))
    table = read_image_sizes(source, cache_folder(config))
    groups = assign_buckets(table, sizes, min_bucket_size)
    parts = [f"{size} {hashlib.sha256(items.tobytes()).hexdigest()}" for size, items in groups]
    return groups, fingerprint(source.fingerprint, *parts)


def open_dataset(config: DataConfig, batch_size: int, *, captions: bool = True) -> Dataset:
    """The data set of stored data. Without `captions` images need none."""
    skipped = BadSampleCounter(config.max_bad_fraction)
    if config.kind == "latents":
        latents = LatentSource(str(config.path))
        groups, data_fingerprint = latents.groups(batch_size), latents.fingerprint
        transform = validation_transform = latents.make
        source = None
    else:
        source = open_image_source(config, skipped, captions=captions)
        groups, data_fingerprint = bucket_items(config, source, batch_size)
        sizes = [size for size, _ in groups]
        transform = make_transform(
            source, sizes, seed=config.seed, crop=config.crop, flip=config.flip
        )
        validation_transform = make_transform(source, sizes)
    items = [group for _, group in groups]
    check_usable_items(config, items, skipped)
    blocks = source if isinstance(source, BlockSource) else None
    training_items, validation_items = _split_validation(
        items, config.validation_size, None if blocks is None else VALIDATION_BLOCKS
    )
    training_items = _fill_batch(training_items, batch_size)
    validation_size = max(map(len, validation_items))
    return Dataset(
        training=MapDataset(
            _training_sampler(training_items, batch_size, config.seed, blocks), transform, skipped
        ),
        validation=MapDataset(
            IndexSampler(validation_items, batch_size=validation_size),
            validation_transform,
            BadSampleCounter(1.0),
            f"validation split of {config.path}",
        ),
        validation_size=validation_size,
        skipped=skipped,
        fingerprint=data_fingerprint,
    )


def check_usable_items(
    config: DataConfig, items: Sequence[Items], skipped: BadSampleCounter
) -> None:
    """InputError if there are no items, with the reasons for which some were left out."""
    if not sum(map(len, items)):
        reasons = skipped.reasons()
        got = f"{config.path} without usable items" + (f" ({reasons})" if reasons else "")
        raise InputError(f"data.path: got {got}, expected images")


def dataset_captions(config: DataConfig) -> Iterator[str]:
    """All captions in the order of the source, including the validation split."""
    source = open_image_source(config, BadSampleCounter(config.max_bad_fraction), captions=True)
    for index in range(len(source)):
        with contextlib.suppress(BadSampleError):
            yield source[index]["caption"]


def _split_validation(
    items: list[Items], size: int, blocks: int | None
) -> tuple[list[Items], list[Items]]:
    """Each bucket's training and validation items; the latter are from the largest bucket."""
    largest = int(np.argmax([len(group) for group in items]))
    indices = validation_indices(len(items[largest]), size, blocks)
    training = [np.delete(g, indices) if i == largest else g for i, g in enumerate(items)]
    validation = items[largest][indices]
    if not len(indices):
        validation = items[largest][:size]
        warnings.warn(
            f"data: {len(items[largest])} items are too few for a validation split, so validation "
            "is on training items (10 are enough)",
            stacklevel=1,
        )
    return training, [validation if i == largest else validation[:0] for i in range(len(items))]


def _fill_batch(items: list[Items], batch_size: int) -> list[Items]:
    """The items, or those of the largest bucket several times if no bucket fills a batch."""
    count = max(map(len, items))
    if count >= batch_size:
        return items
    times = -(-batch_size // count)
    warnings.warn(
        f"data: {count} training items are fewer than a batch of {batch_size}, which has each up "
        f"to {times} times (see batch_size)",
        stacklevel=1,
    )
    largest = int(np.argmax([len(group) for group in items]))
    return [np.tile(g, times) if i == largest else g for i, g in enumerate(items)]


def _training_sampler(
    items: list[Items], batch_size: int, seed: int, blocks: BlockSource | None
) -> IndexSampler:
    """The sampling order; block by block for a source with blocks."""
    if blocks is None:
        return IndexSampler(items, batch_size=batch_size, seed=seed)
    max_lanes = max(1, blocks.max_open_blocks // len(items))
    lanes = math.gcd(batch_size, 1 << (max_lanes.bit_length() - 1))
    return BlockShuffleSampler(
        items, batch_size=batch_size, starts=blocks.block_starts, lanes=lanes, seed=seed
    )
