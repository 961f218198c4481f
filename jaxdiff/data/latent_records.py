"""Records of a latent cache as they are written, and that of the null caption."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import DTYPES, Float, Int, NDArray
from jaxdiff.data.bad_samples import BadSampleError
from jaxdiff.data.buckets import Size
from jaxdiff.data.latents import NULL_CAPTION_FILE, LatentCacheInfo, array_of
from jaxdiff.data.sources.records import RecordFiles, parse_record


def sharded(
    groups: Sequence[tuple[Size, Int[NDArray, "_"]]], shard_size: int
) -> list[tuple[Size, Int[NDArray, "_"]]]:
    """The size and the items of each shard: `shard_size` of them, fewer in a size's last."""
    return [
        (size, items[start : start + shard_size])
        for size, items in groups
        for start in range(0, len(items), shard_size)
    ]


def pack_record(
    item: Mapping[str, Any],
    mean: Float[NDArray, "h w c"],
    logvar: Float[NDArray, "h w c"],
    dtype: str,
    text_embeddings: Mapping[str, NDArray] | None = None,
) -> dict[str, Any]:
    """The record of the prepared image `item` and its latents' distribution.

    With the `text_embeddings` of its caption, if there are any.
    """
    return pack_arrays({"mean": mean, "logvar": logvar, **(text_embeddings or {})}, dtype) | {
        "caption": item["caption"],
        "time_ids": item["time_ids"].tolist(),
    }


def pack_arrays(arrays: Mapping[str, NDArray], dtype: str) -> dict[str, bytes]:
    """Arrays as bytes of `dtype`; InputError for numbers that overflow it."""
    found = {}
    for name, array in arrays.items():
        with np.errstate(over="ignore"):
            small = array.astype(DTYPES[dtype])
        if not np.isfinite(small).all():
            raise InputError(
                f"dtype: got {dtype} for {name} up to {np.abs(array).max():g}, expected a "
                "dtype of that range: bfloat16 or float32"
            )
        found[name] = small.tobytes()
    return found


def read_null(folder: pathlib.Path, described: LatentCacheInfo) -> dict[str, NDArray]:
    """The text embeddings of the null caption, by name, in the stored dtype."""
    path = folder / NULL_CAPTION_FILE
    if not path.is_file():
        raise InputError(
            f"data.path: got {folder} without {NULL_CAPTION_FILE}, expected that file: the same "
            "cache-latents command writes it"
        )
    try:
        record = parse_record(RecordFiles([path])[0])
        return {
            n: array_of(record, n, described.dtype, s)
            for n, s in described.text_embedding_shapes.items()
        }
    except (BadSampleError, RuntimeError, KeyError, ValueError, TypeError):
        raise InputError(f"{path}: got a broken file, expected a record (delete it)") from None
