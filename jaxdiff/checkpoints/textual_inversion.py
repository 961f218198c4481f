"""Textual inversion files (2208.01618): vectors that stand for a new word."""

import pathlib
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.checkpoints.file_kinds import kind_of_model
from jaxdiff.checkpoints.inversion_names import PAIR, T5, bundled, embeddings, token_name
from jaxdiff.checkpoints.safetensors import LazyTensor, TensorInfo, read_tensor, write_tensors
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype, Float, NDArray
from jaxdiff.models.t5.module import T5EncoderModel

IMAGES = (".png", ".webp", ".jpg", ".jpeg", ".jxl", ".avif")


class Inversion(NamedTuple):
    """A token, and its vectors for each text encoder, as many for all.

    T5 may have none where there is a CLIP too: it then reads the token as any text.
    """

    token: str
    vectors: dict[str, Float[NDArray, "n d"]]


def optional_encoders(encoders: Mapping[str, Any]) -> list[str]:
    """The text encoders, by component, that need no vectors of their own: T5 beside CLIP."""
    t5 = [name for name, each in encoders.items() if isinstance(each, T5EncoderModel)]
    return t5 if len(t5) < len(encoders) else []


def read_inversion(
    path: pathlib.Path,
    widths: Mapping[str, int],
    token: str | None = None,
    *,
    optional: Collection[str] = (),
) -> Inversion:
    """The token in a file, for text encoders of these widths, by component.

    `token` replaces the file's; those that are `optional` are `optional_encoders`. Raises
    InputError for anything that does not fit.
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
    vectors = _vectors(path, entries, widths, optional)
    return Inversion(own if token is None else token, vectors)


def read_bundled(
    path: pathlib.Path, widths: Mapping[str, int], *, optional: Collection[str] = ()
) -> list[Inversion]:
    """The tokens that come with a LoRA in its file. Raises InputError as `read_inversion`."""
    entries = read_weights(path)
    found = []
    for token, names in bundled(entries).items():
        own = {name: entries[whole] for name, whole in names.items()}
        if token_name(path, own) != path.stem:  # any tensor may be a token by itself, but not here
            raise InputError(
                f"{path}: bundle_emb.{token}: got {_listing(own)}, expected one embedding"
            )
        found.append(Inversion(token, _vectors(path, own, widths, optional)))
    return found


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} tensors ({shown})"


def _vectors(
    path: pathlib.Path,
    entries: Mapping[str, TensorInfo],
    widths: Mapping[str, int],
    optional: Collection[str],
) -> dict[str, Float[NDArray, "n d"]]:
    """The vectors of an embedding for each text encoder; T5's, if any, are `optional`."""
    names, required = embeddings(entries), [name for name in widths if name not in optional]
    if len(names) == 1:
        # The refiner has only the second encoder.
        places = dict.fromkeys(names, required[0])
    else:
        own = {name: place for name, place in PAIR.items() if name in names}
        places = {name: place for name, place in own.items() if place in required}
        t5 = [name for name in names if name in T5]
        places |= {name: place for name in t5 for place in optional}
        if t5 and not optional:
            warnings.warn(
                f"{path}: got vectors for T5, which have no effect on a model without it",
                stacklevel=2,
            )
    if not set(required) <= set(places.values()):
        raise InputError(
            f"{path}: got vectors for {len(places)} text encoders, expected {len(required)}"
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


def write_inversion(
    folder: pathlib.Path, inversion: Inversion, *, t5: Collection[str] = ()
) -> pathlib.Path:
    """Write a token as diffusers does; of several text encoders, for which it has none, as kohya.

    The token is then the name of the file, which is returned. `t5` are the components of T5.
    """
    named = len(inversion.vectors) == 1
    path = folder / ("learned_embeds" if named else inversion.token)
    path = path.with_name(f"{path.name}.safetensors")
    tables = inversion.vectors
    if named:
        tensors = {inversion.token: next(iter(tables.values()))}
    else:
        clips = {place: name for name, place in PAIR.items()}
        tensors = {T5[0] if place in t5 else clips[place]: rows for place, rows in tables.items()}
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
