"""PyTorch's own files (.ckpt, .pt, .bin): the table of their tensors, without running their code.

`torch.save` writes an uncompressed zip archive: `data.pkl`, a pickle of the objects in which
tensors refer to storages, and the storages as members `data/0`, `data/1`, ... A pickle is a program
that may call any function it names. Here it may build containers and refer to tensors, and nothing
else: no name in the file is ever imported, and a call of anything but PyTorch's own functions for
making a tensor is refused.
"""

import collections
import io
import math
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxdiff.checkpoints.safetensors import BITS, MAX_DIMENSIONS, TensorInfo
from jaxdiff.core.errors import InputError, os_error_message

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
DATA = "data.pkl"
MAX_PICKLE = 256 * 2**20  # bytes; names and shapes of the largest models take a few MB
LOCAL_HEADER = 30  # bytes of a zip member's header before its name
MAX_DEPTH = 32  # of dictionaries inside each other
# What a pickle of containers, numbers, texts and tensors is made of.
# fmt: off
OPCODES = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_DICT", "EMPTY_LIST",
    "EMPTY_TUPLE", "EMPTY_SET", "DICT", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND",
    "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET",
    "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID",
})
# fmt: on


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in a member of the archive."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A global that the pickle mentions: inert, for it is never looked up."""

    module: str
    name: str

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise InputError(f"a call of {self.module}.{self.name}")


class _ParameterDict(dict[str, Any]):
    """PyTorch's container of parameters, which old textual inversions are pickled in."""

    def __setstate__(self, state: Any) -> None:
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        if not isinstance(parameters, dict):
            raise InputError(f"the parameters {parameters!r:.80}")
        self.update(parameters)


def read_torch_pickle(path: pathlib.Path) -> dict[str, TensorInfo]:
    """The tensors of a `torch.save` file by their dotted names, those below "state_dict" if any.

    Raises InputError, naming the file, for what is no such file or would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            top = _top(path, members)
            root = _unpickle(path, archive, members[top + DATA])
            offsets = _StorageOffsets(path, top, members)
            entries: dict[str, TensorInfo] = {}
            for name, tensor in _flat(path, _state_dict(root), ()):
                if name in entries:
                    raise InputError(f"{path}: got {name!r:.80} twice, expected it once")
                entries[name] = offsets.entry(name, tensor)
            return entries
    except OSError as error:
        raise InputError(
            f"{path}: got {os_error_message(error)}, expected a PyTorch file"
        ) from None
    except (zipfile.BadZipFile, NotImplementedError):
        raise InputError(
            f"{path}: got a file that is no whole zip archive, expected one of torch.save: it is "
            "damaged, no checkpoint, or older than PyTorch 1.6 (which can load and save it again)"
        ) from None


def _top(path: pathlib.Path, members: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder inside the archive that holds data.pkl, with a slash; "" for none."""
    found = [name for name in members if name == DATA or name.endswith(f"/{DATA}")]
    if len(found) != 1:
        raise InputError(
            f"{path}: got {len(found)} members {DATA}, expected one (not a PyTorch file?)"
        )
    return found[0].removesuffix(DATA)


def _unpickle(path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    if info.file_size > MAX_PICKLE or info.compress_type != zipfile.ZIP_STORED:
        raise InputError(
            f"{path}: got {info.file_size} bytes of {DATA}, expected a few MB, uncompressed"
        )
    try:
        data = archive.read(info)
        _screen(data)
        return _Unpickler(io.BytesIO(data)).load()
    except InputError as error:
        raise InputError(f"{path}: got {error} in {DATA}, expected only tensors") from None
    except Exception as error:  # a broken program can fail in any way
        raise InputError(
            f"{path}: got a broken {DATA} ({type(error).__name__}), expected tensors"
        ) from None


def _screen(data: bytes) -> None:
    """InputError for an instruction that tensors do not need, before any is carried out."""
    for opcode, argument, _ in pickletools.genops(data):
        # Room is made for as many memos as the highest number says.
        bomb = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(argument)) > len(data)
        if opcode.name not in OPCODES or bomb:
            raise InputError(f"the instruction {opcode.name}")


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, texts and references to tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global; nothing is imported."""
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _rebuild_parameter
        if module == "torch" and name in STORAGES:
            return _Name(module, name)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch.nn.modules.container", "ParameterDict"):
            return _ParameterDict
        if (module, name) in (("builtins", "set"), ("__builtin__", "set")):
            return set
        return _Name(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", its class, member, device, number of elements)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise InputError(f"the reference {pid!r:.80}")
        _, kind, key, _, count = pid
        known = isinstance(kind, _Name) and kind.module == "torch" and kind.name in STORAGES
        if not known or not isinstance(key, str) or not _is_count(count):
            raise InputError(f"the storage {pid!r:.80}")
        return _Storage(STORAGES[kind.name], key, count)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    sound = (
        isinstance(storage, _Storage)
        and _is_count(offset)
        and all(
            isinstance(sizes, tuple) and len(sizes) <= MAX_DIMENSIONS and all(map(_is_count, sizes))
            for sizes in (shape, strides)
        )
        and len(shape) == len(strides)
    )
    if not sound:
        raise InputError(f"the tensor {(storage, offset, shape, strides)!r:.120}")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _state_dict(root: Any) -> Any:
    """The part of a training's checkpoint that holds the weights."""
    if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        return root["state_dict"]
    return root


def _flat(path: pathlib.Path, value: Any, names: tuple[str, ...]) -> Iterator[tuple[str, _Tensor]]:
    """The tensors in nested dictionaries; numbers and texts beside them are left out."""
    if len(names) > MAX_DEPTH:
        raise InputError(f"{path}: got more than {MAX_DEPTH} dictionaries inside each other")
    if isinstance(value, _Tensor):
        yield ".".join(names) or "tensor", value
    elif isinstance(value, dict):
        for name, item in value.items():
            if isinstance(name, str):
                yield from _flat(path, item, (*names, name))


class _StorageOffsets:
    """Where the archive's members lie in the file."""

    def __init__(
        self, path: pathlib.Path, top: str, members: Mapping[str, zipfile.ZipInfo]
    ) -> None:
        self._path, self._top, self._members = path, top, members
        self._starts: dict[str, int] = {}

    def entry(self, name: str, tensor: _Tensor) -> TensorInfo:
        """The place of one tensor; InputError if its storage does not hold it."""
        storage = tensor.storage
        info = self._members.get(f"{self._top}data/{storage.key}")
        width = BITS[storage.dtype] // 8
        axes = _order(tensor)
        count = math.prod(tensor.shape)
        fits = (
            info is not None
            and info.compress_type == zipfile.ZIP_STORED
            and info.file_size == storage.count * width
            and tensor.offset + count <= storage.count
        )
        if info is None or not fits or axes is None:
            raise InputError(
                f"{self._path}: got {name} {tensor.shape} outside its storage, "
                "expected a complete file of dense tensors"
            )
        identity = axes == tuple(range(len(axes)))
        return TensorInfo(
            path=self._path,
            name=name,
            dtype=storage.dtype,
            shape=tensor.shape,
            start=self._start(info) + tensor.offset * width,
            nbytes=count * width,
            axes=None if identity else axes,
        )

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin: its own header may be longer than the directory's."""
        if info.filename not in self._starts:
            with self._path.open("rb") as file:
                file.seek(info.header_offset)
                header = file.read(LOCAL_HEADER)
            if len(header) < LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
                raise InputError(f"{self._path}: got a broken member {info.filename!r:.80}")
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(
                header[28:30], "little"
            )
            self._starts[info.filename] = info.header_offset + LOCAL_HEADER + lengths
        return self._starts[info.filename]


def _order(tensor: _Tensor) -> tuple[int, ...] | None:
    """The position in memory of each axis of a dense tensor; None if it is not dense."""
    # Axes of one element may have any stride: they keep their place among their neighbours.
    axes = range(len(tensor.shape))
    if _dense(tensor, tuple(axes)):
        return tuple(axes)
    stored = tuple(sorted(axes, key=lambda axis: -tensor.strides[axis]))
    return tuple(stored.index(axis) for axis in axes) if _dense(tensor, stored) else None


def _dense(tensor: _Tensor, stored: tuple[int, ...]) -> bool:
    """Whether the axes in this order, slowest first, follow each other without gaps."""
    step = 1
    for axis in reversed(stored):
        if tensor.shape[axis] > 1 and tensor.strides[axis] != step:
            return False
        step *= tensor.shape[axis]
    return True
