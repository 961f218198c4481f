"""Textual inversion files (2208.01618): vectors that stand for a new word."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxdiff.checkpoints.inversion_names import PAIR, word_of
from jaxdiff.checkpoints.tensors import read_tensor
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray


class Inversion(NamedTuple):
    """A word, and its vectors for each text encoder, as many for all."""

    word: str
    vectors: dict[str, Float[NDArray, "n d"]]


def read_inversion(
    path: pathlib.Path, widths: Mapping[str, int], word: str | None = None
) -> Inversion:
    """The word in a file, for text encoders of these widths, by component.

    `word` replaces the file's. Raises InputError for anything that does not fit.
    """
    entries = read_weights(path)
    own = word_of(path, entries)
    if own is None:
        shown = ", ".join(sorted(entries)[:4]) + (", ..." if len(entries) > 4 else "")
        raise InputError(f"{path}: got {len(entries)} tensors ({shown}), expected one word")
    if len(entries) == 1:
        # The refiner has only the second encoder.
        places = dict.fromkeys(entries, next(iter(widths)))
    else:
        places = {name: place for name, place in PAIR.items() if place in widths}
    if set(places.values()) != set(widths):
        raise InputError(
            f"{path}: got vectors for {len(places)} text encoders, expected {len(widths)}"
        )
    vectors = {}
    for name, place in places.items():
        values = read_tensor(entries[name]).astype(np.float32)
        values = values[None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] != widths[place] or not len(values):
            raise InputError(
                f"{path}: {name}: got shape {entries[name].shape}, "
                f"expected (n, {widths[place]}) for {place}"
            )
        vectors[place] = values
    if len({len(rows) for rows in vectors.values()}) > 1:
        raise InputError(f"{path}: got different numbers of vectors, expected as many for each")
    return Inversion(own if word is None else word, vectors)
