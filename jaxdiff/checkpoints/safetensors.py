"""The safetensors format: a table of tensors, then their bytes.

Layout (huggingface/safetensors): 8 bytes little-endian header length, a JSON object
`{name: {dtype, shape, data_offsets}}` with an optional `__metadata__` of strings, then the data,
which the offsets cover without gap or overlap. Files are read with plain reads, one tensor at a
time: mapping the file would count its pages as memory, and one cut short while mapped kills the
process.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.core.errors import InputError, os_error_message

MAX_HEADER = 100_000_000  # bytes, as in the reference implementation
MAX_DIMENSIONS = 32
MAX_COUNT = 2**48
ALIGNMENT = 64  # bytes; XLA's CPU client takes over a buffer so aligned without copying it

NUMPY_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = ("F64", "F32", "BF16", "F16")
FLOAT8: dict[str, Any] = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
BITS = {name: 8 * np.dtype(dtype).itemsize for name, dtype in NUMPY_DTYPES.items()} | {
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
NAMES = {np.dtype(dtype): name for name, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A stored tensor: its file, name, dtype, shape and byte range."""

    path: pathlib.Path
    name: str
    dtype: str  # in the format's spelling: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    nbytes: int
    # Position in the file of each axis of `shape`, where the file's order is another: (1, 0) for a
    # matrix that is stored transposed.
    axes: tuple[int, ...] | None = None
    scale: "TensorInfo | None" = None  # a number that the stored values are to be multiplied by
    swapped: bool = False  # whether the halves of the first axis lie in the other order in the file
    negated: bool = False  # whether the file has the values times -1
    identity: bool = False  # an identity matrix, which no file holds
    # Of rows that lie in so many groups, each of so many parts, the part of this number of each.
    interleaved: tuple[int, int, int] | None = None
    constant: float | None = None  # the value in all places, which no file holds

    def rows(self, begin: int, end: int) -> "TensorInfo":
        """The rows begin ... end - 1 of the first axis, which follow each other in the file."""
        row = self.nbytes // self.shape[0]
        return replace(
            self,
            shape=(end - begin, *self.shape[1:]),
            start=self.start + begin * row,
            nbytes=(end - begin) * row,
        )

    def transposed(self) -> "TensorInfo":
        """The transpose of a matrix that is stored by rows."""
        return replace(self, shape=self.shape[::-1], axes=(1, 0))

    def with_swapped_halves(self) -> "TensorInfo":
        """The second half of an even number of rows before the first; not for `rows` any more."""
        return replace(self, swapped=not self.swapped)

    def times_minus_one(self) -> "TensorInfo":
        """The negative of a tensor of floats."""
        return replace(self, negated=not self.negated)

    def every(self, number: int, parts: int, *, groups: int) -> "TensorInfo":
        """Part `number` of the rows of each group, where each of `groups` has `parts` of them."""
        shape = self.shape[0] // parts, *self.shape[1:]
        return replace(self, shape=shape, interleaved=(groups, parts, number))


def identity_matrix(path: pathlib.Path, name: str, width: int) -> TensorInfo:
    """The identity (width, width) in float32, for a projection that a file at `path` leaves out."""
    return TensorInfo(
        path=path, name=name, dtype="F32", shape=(width, width), start=0, nbytes=0, identity=True
    )


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor to be written: its dtype and shape, and a function that fetches its values."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


def read_table(path: pathlib.Path) -> dict[str, TensorInfo]:
    """The tensors of the safetensors file at `path`, from its header alone.

    Raises InputError, naming the file, for whatever is not a whole and consistent file.
    """
    table, length, size = _header(path)
    table.pop("__metadata__", None)
    entries = {name: _entry(path, name, field, 8 + length) for name, field in table.items()}
    _check_coverage(path, entries, 8 + length, size)
    return entries


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """The free texts in the header of the safetensors file at `path`; raises as `read_table`."""
    return _header(path)[0].get("__metadata__", {})


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, its length and the file's."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(64)
            length = _header_length(path, head, size)
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise InputError(
            f"{path}: got {os_error_message(error)}, expected safetensors weights"
        ) from None
    table = parse_object(header, f"{path} (header)")
    _check_metadata(path, table.get("__metadata__", {}))
    return table, length, size


def numpy_dtype(entry: TensorInfo) -> np.dtype:
    """The dtype of what `read_tensor` returns.

    Raises InputError for one that is not read (floats of less than 8 bits, and rare ones of 8).
    """
    if entry.dtype in FLOAT8 or entry.scale is not None:
        return np.dtype(np.float32)
    if entry.dtype not in NUMPY_DTYPES:
        raise InputError(
            f"{entry.path}: got {entry.name} in {entry.dtype}, expected F32, F16, BF16 or F8_E4M3"
        )
    return np.dtype(NUMPY_DTYPES[entry.dtype])


def read_tensor(entry: TensorInfo) -> np.ndarray:
    """The values of one tensor in a fresh, aligned buffer of its own; raises as `numpy_dtype`.

    8-bit floats are returned in float32, and so is what has a scale, times it.
    """
    final = numpy_dtype(entry)
    if entry.identity:
        return np.identity(entry.shape[0], final)
    if entry.constant is not None:
        return np.full(entry.shape, entry.constant, final)
    spare = np.empty(entry.nbytes + ALIGNMENT, np.uint8)
    begin = -spare.ctypes.data % ALIGNMENT
    buffer = spare[begin : begin + entry.nbytes]
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < entry.nbytes:  # the kernel returns at most 2 GiB a call
                got = file.readinto(buffer.data[done:])
                if not got:
                    raise InputError(f"{entry.path}: got a file cut short while it was read")
                done += got
    except OSError as error:
        raise InputError(
            f"{entry.path}: got {os_error_message(error)}, expected {entry.name}"
        ) from None
    values = buffer.view((NUMPY_DTYPES | FLOAT8)[entry.dtype]).astype(final, copy=False)
    if entry.swapped:
        values = np.roll(values, values.size // 2)
    if entry.negated:
        values = -values
    if entry.interleaved is not None:
        groups, parts, number = entry.interleaved
        values = values.reshape(groups, parts, -1)[:, number].reshape(-1)
    if entry.scale is not None:
        values = values * read_tensor(entry.scale).astype(final).reshape(())
    axes = entry.axes
    if axes is None:
        return values.reshape(entry.shape)
    stored = sorted(range(len(axes)), key=axes.__getitem__)
    return values.reshape([entry.shape[axis] for axis in stored]).transpose(axes)


def write_tensors(
    path: pathlib.Path,
    tensors: Mapping[str, LazyTensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file at `path`, fetching one tensor at a time.

    The order is the reference writer's: wider dtypes first (which keeps each aligned), then names.
    The metadata `format: pt` is what transformers asks of a file that it reads.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        begin, end = end, end + math.prod(tensors[name].shape) * tensors[name].dtype.itemsize
        table[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            values = np.ascontiguousarray(tensors[name].fetch())
            file.write(values.reshape(-1).view(np.uint8).data)


def _header_length(path: pathlib.Path, head: bytes, size: int) -> int:
    """The header's length, after a look at what else the file might be."""
    if head.startswith(b"version "):
        raise InputError(
            f"{path}: got a Git LFS pointer, expected the weights themselves (run `git lfs pull`)"
        )
    if head.lstrip().lower().startswith((b"<!doc", b"<html", b"<?xml", b"<head")):
        raise InputError(f"{path}: got an HTML page, expected safetensors (download it again)")
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise InputError(f"{path}: got a pickled PyTorch file, expected safetensors")
    if len(head) < 8:
        raise InputError(f"{path}: got {size} bytes, expected a safetensors file (truncated?)")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise InputError(
            f"{path}: got a header of {length} bytes, expected at most {MAX_HEADER} "
            "(not a safetensors file?)"
        )
    if 8 + length > size:
        raise InputError(f"{path}: got {size} bytes, expected at least {8 + length} (truncated)")
    return length


def _check_metadata(path: pathlib.Path, metadata: Any) -> None:
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        raise InputError(f"{path}: got __metadata__ {metadata!r:.80}, expected strings by name")


def _entry(path: pathlib.Path, name: str, field: Any, base: int) -> TensorInfo:
    """The header's row for one tensor, checked."""
    sound = (
        isinstance(field, dict)
        and set(field) == {"dtype", "shape", "data_offsets"}
        and isinstance(field["dtype"], str)
        and field["dtype"] in BITS
        and _counts(field["shape"])
        and _counts(field["data_offsets"])
        and len(field["data_offsets"]) == 2
    )
    if not sound:
        raise InputError(
            f"{path}: got {name!r:.80}: {field!r:.120} in the header, "
            "expected a known dtype, a shape and two offsets"
        )
    begin, end = field["data_offsets"]
    bits = math.prod(field["shape"]) * BITS[field["dtype"]]
    if 8 * (end - begin) != bits:
        raise InputError(
            f"{path}: got {end - begin} bytes for {name!r:.80}, expected {bits / 8:g} for "
            f"{field['dtype']} {tuple(field['shape'])!r:.80}"
        )
    return TensorInfo(
        path=path,
        name=name,
        dtype=field["dtype"],
        shape=tuple(field["shape"]),
        start=base + begin,
        nbytes=end - begin,
    )


def _counts(value: Any) -> bool:
    """Whether `value` is a list of counts (True and False are none) that numpy has room for."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(v) is int and 0 <= v < MAX_COUNT for v in value)
        and math.prod(v or 1 for v in value) < MAX_COUNT**2
    )


def _check_coverage(
    path: pathlib.Path, entries: Mapping[str, TensorInfo], base: int, size: int
) -> None:
    """The tensors must lie end to end and fill the file."""
    end = base
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != end:
            raise InputError(
                f"{path}: got {entry.name!r:.80} at byte {entry.start}, expected it at {end} "
                "(tensors overlap or leave a gap)"
            )
        end += entry.nbytes
    if end != size:
        hint = "truncated" if size < end else "something follows the weights"
        raise InputError(f"{path}: got {size} bytes, expected {end} ({hint})")
