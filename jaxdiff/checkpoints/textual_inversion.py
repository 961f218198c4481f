"""Textual inversion files (2208.01618): vectors that stand for a new word."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from jaxdiff.checkpoints.file_kinds import kind_of_model
from jaxdiff.checkpoints.inversion_names import PAIR, bundled, embeddings, token_name
from jaxdiff.checkpoints.safetensors import LazyTensor, TensorInfo, read_tensor, write_tensors
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, Float, NDArray

IMAGES = (".png", ".webp", ".jpg", ".jpeg", ".jxl", ".avif")


class Inversion(NamedTuple):
    """A token, and its vectors for each text encoder, as many for all."""

    token: str
    vectors: dict[str, Float[NDArray, "n d"]]


def read_inversion(
    path: pathlib.Path, widths: Mapping[str, int], token: str | None = None
) -> Inversion:
    """The token in a file, for text encoders of these widths, by component.

    `token` replaces the file's. Raises InputError for anything that does not fit.
    """
    if path.suffix.lower() in IMAGES:
        raise InputError(
            f"{path}: got an image; a textual inversion inside of one is not read, "
            "expected a .pt or .safetensors file"
        )
    entries = read_weights(path)
    own = token_name(path, entries)
    if own is None:
        got = kind_of_model(entries) or _listing(entries)
        raise InputError(f"{path}: got {got}, expected one embedding of one word")
    return Inversion(own if token is None else token, _vectors(path, entries, widths))


def read_bundled(path: pathlib.Path, widths: Mapping[str, int]) -> list[Inversion]:
    """The tokens that come with a LoRA in its file. Raises InputError as `read_inversion`."""
    entries = read_weights(path)
    found = []
    for token, names in bundled(entries).items():
        own = {name: entries[whole] for name, whole in names.items()}
        if token_name(path, own) != path.stem:  # any tensor may be a token by itself, but not here
            raise InputError(
                f"{path}: bundle_emb.{token}: got {_listing(own)}, expected one embedding"
            )
        found.append(Inversion(token, _vectors(path, own, widths)))
    return found


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} tensors ({shown})"


def _vectors(
    path: pathlib.Path, entries: Mapping[str, TensorInfo], widths: Mapping[str, int]
) -> dict[str, Float[NDArray, "n d"]]:
    """The vectors of an embedding for each text encoder."""
    names = embeddings(entries)
    if len(names) == 1:
        # The refiner has only the second encoder.
        places = dict.fromkeys(names, next(iter(widths)))
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
        raise InputError(
            f"{path}: got different numbers of vectors, expected the same number for each"
        )
    return vectors


def write_inversion(folder: pathlib.Path, inversion: Inversion) -> pathlib.Path:
    """Write a token as diffusers does; of two text encoders, which it has no form for, as kohya.

    The token is then the name of the file, which is returned.
    """
    named = len(inversion.vectors) == 1
    path = folder / ("learned_embeds" if named else inversion.token)
    path = path.with_name(f"{path.name}.safetensors")
    tables = inversion.vectors
    if named:
        tensors = {inversion.token: next(iter(tables.values()))}
    else:
        tensors = {name: tables[place] for name, place in PAIR.items()}
    with atomic_file(path) as temporary:
        write_tensors(temporary, {name: _pending(rows) for name, rows in tensors.items()})
    return path


def convert_inversion(target: pathlib.Path, source: pathlib.Path, *, dtype: Dtype) -> None:
    """Write the textual inversion file `source` again, in `dtype`."""
    tensors = {name: read_tensor(entry) for name, entry in read_weights(source).items()}
    with atomic_file(target) as temporary:
        write_tensors(temporary, {name: _pending(t, dtype) for name, t in tensors.items()})


def _pending(rows: NDArray, dtype: Dtype = np.float32) -> LazyTensor:
    values = np.asarray(rows).astype(dtype)
    return LazyTensor(dtype=values.dtype, shape=values.shape, fetch=lambda: values)
