"""Legacy Flax weights (*.msgpack of diffusers and transformers): the table of their tensors.

`flax.serialization.to_bytes` wrote one msgpack map, nested by name. An array is an extension of
code 1 whose content is msgpack again: [shape, name of the dtype, bytes in C order]. Only names and
shapes are read here; msgpack libraries would read the whole file. Arrays have Flax's layout:
kernels are (in, out) and HWIO.
"""

import math
import pathlib
import re
from collections.abc import Iterator
from typing import BinaryIO

from jaxdiff.checkpoints.safetensors import BITS, MAX_DIMENSIONS, TensorInfo
from jaxdiff.core.errors import InputError, os_error_message

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
}
ARRAY = 1  # the extension's code
MAX_NAME = 256
MAX_DEPTH = 32
# Lists of modules, which Flax in diffusers numbered with an underscore ("resnets_0").
LISTS = re.compile(
    r"^(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|to_out"
    r"|net)_(\d+)$"
)
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Where PyTorch's axes are among Flax's: (out, in) of (in, out), OIHW of HWIO.
AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
# First byte -> kind, and either the length itself or the width in bytes of the length that follows.
_WIDTHS = {
    0xC4: ("bytes", 1),
    0xC5: ("bytes", 2),
    0xC6: ("bytes", 4),
    0xC7: ("extension", 1),
    0xC8: ("extension", 2),
    0xC9: ("extension", 4),
    0xD9: ("text", 1),
    0xDA: ("text", 2),
    0xDB: ("text", 4),
    0xDC: ("list", 2),
    0xDD: ("list", 4),
    0xDE: ("map", 2),
    0xDF: ("map", 4),
    0xCC: ("number", 1),
    0xCD: ("number", 2),
    0xCE: ("number", 4),
    0xCF: ("number", 8),
}
_FIXED = (
    (0x00, 0x7F, "number"),
    (0x80, 0x8F, "map"),
    (0x90, 0x9F, "list"),
    (0xA0, 0xBF, "text"),
)


def read_flax_msgpack(path: pathlib.Path) -> dict[str, TensorInfo]:
    """The tensors of a legacy Flax file under PyTorch's names, in PyTorch's order of axes.

    Raises InputError, naming the file, for what is no such file or is cut short.
    """
    try:
        with path.open("rb") as file:
            if file.read(8).startswith(b"version "):
                raise InputError(
                    f"{path}: got a Git LFS pointer, expected the weights (run `git lfs pull`)"
                )
            file.seek(0)
            cursor = _Cursor(path, file)
            found = dict(_tensors(cursor, ()))
            if cursor.position != cursor.size:
                raise cursor.broken("more bytes after the weights")
    except OSError as error:
        raise InputError(f"{path}: got {os_error_message(error)}, expected Flax weights") from None
    return found


def _tensors(cursor: "_Cursor", names: tuple[str, ...]) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors of the map that begins here, which has `names` above it."""
    if len(names) > MAX_DEPTH:
        raise cursor.broken(f"more than {MAX_DEPTH} maps inside each other")
    kind, count = cursor.head()
    if kind != "map":
        raise cursor.broken(f"a {kind}", "a map of arrays by name")
    for _ in range(count):
        path = (*names, cursor.text())
        kind, _ = cursor.peek()
        if kind == "map":
            yield from _tensors(cursor, path)
        else:
            entry = _array(cursor, path)
            yield entry.name, entry


def _array(cursor: "_Cursor", names: tuple[str, ...]) -> TensorInfo:
    """The array that begins here; the cursor skips its values."""
    kind, length = cursor.head()
    if kind != "extension" or cursor.number(1) != ARRAY:
        raise cursor.broken(f"a {kind} at {'.'.join(names)}", "an array")
    end = cursor.position + length
    cursor.expect("list", 3)
    kind, dimensions = cursor.head()
    if kind != "list" or dimensions > MAX_DIMENSIONS:
        raise cursor.broken(f"a {kind} at {'.'.join(names)}", "a shape")
    shape = tuple(cursor.expect("number") for _ in range(dimensions))
    dtype = cursor.text()
    kind, nbytes = cursor.head()
    start = cursor.position
    wanted = math.prod(shape) * BITS[DTYPES[dtype]] // 8 if dtype in DTYPES else None
    if kind != "bytes" or nbytes != wanted or start + nbytes != end:
        raise cursor.broken(f"{dtype:.40} {shape} in {nbytes} bytes at {'.'.join(names)}")
    cursor.skip(nbytes)
    axes = AXES.get(len(shape)) if names[-1] == "kernel" else None
    return TensorInfo(
        path=cursor.path,
        name=torch_name(names),
        dtype=DTYPES[dtype],
        shape=tuple(shape[axis] for axis in axes) if axes else shape,
        start=start,
        nbytes=nbytes,
        axes=axes,
    )


def torch_name(names: tuple[str, ...]) -> str:
    """PyTorch's name of the leaf that Flax keeps under `names`."""
    *modules, leaf = names
    parts = [LISTS.sub(r"\1.\2", module) for module in modules]
    return ".".join([*parts, LEAVES.get(leaf, leaf)])


class _Cursor:
    """Reads msgpack heads one after another."""

    def __init__(self, path: pathlib.Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self.size = path.stat().st_size

    @property
    def position(self) -> int:
        """Bytes from the beginning of the file."""
        return self._file.tell()

    def broken(self, got: str, expected: str = "legacy Flax weights") -> InputError:
        """The error for what is here."""
        return InputError(f"{self.path}: got {got} (byte {self.position}), expected {expected}")

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise self.broken("the end of the file", "more (truncated?)")
        return data

    def number(self, width: int) -> int:
        """An unsigned integer of so many bytes."""
        return int.from_bytes(self._read(width), "big")

    def peek(self) -> tuple[str, int]:
        """`head`, without moving on."""
        position = self.position
        head = self.head()
        self._file.seek(position)
        return head

    def head(self) -> tuple[str, int]:
        """The kind of what begins here and its length; a number is its own."""
        first = self.number(1)
        for low, high, kind in _FIXED:
            if low <= first <= high:
                return kind, first - low
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << (first - 0xD4)
        if first not in _WIDTHS:
            raise self.broken(f"the byte {first:#x}")
        kind, width = _WIDTHS[first]
        return kind, self.number(width)

    def expect(self, kind: str, length: int | None = None) -> int:
        """The length of what begins here, which must be of this kind."""
        found, count = self.head()
        if found != kind or length not in (None, count):
            raise self.broken(f"a {found} of {count}", f"a {kind}")
        return count

    def text(self) -> str:
        """The short text that begins here."""
        length = self.expect("text")
        if length > MAX_NAME:
            raise self.broken(f"a name of {length} bytes")
        try:
            return self._read(length).decode()
        except UnicodeDecodeError:
            raise self.broken("a name that is no text") from None

    def skip(self, count: int) -> None:
        """Move on, but not beyond the end of the file."""
        if self.position + count > self.size:
            raise self.broken("the end of the file", "more (truncated?)")
        self._file.seek(count, 1)
