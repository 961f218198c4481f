"""Which files hold a component's weights: plain, a variant, or shards with an index.

File names are diffusers' and transformers': `STEM.safetensors`, `STEM.VARIANT.safetensors`,
`STEM.safetensors.index.json`, `STEM.safetensors.index.VARIANT.json`, where STEM is
`diffusion_pytorch_model` or `model`; the same with `.bin` for pickled PyTorch files and with
`.msgpack` for legacy Flax ones, which count only where there are no safetensors.
"""

import hashlib
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable

from jaxdiff.checkpoints.flax_msgpack import read_flax_msgpack
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.quantised import with_scales
from jaxdiff.checkpoints.safetensors import TensorInfo, read_table
from jaxdiff.checkpoints.torch_pickle import read_torch_pickle
from jaxdiff.core.errors import InputError

# Extensions in the order of preference, with the stems of their files.
STEMS = {
    ".safetensors": ("diffusion_pytorch_model", "model"),
    ".bin": ("diffusion_pytorch_model", "pytorch_model"),
    ".msgpack": ("diffusion_flax_model", "flax_model"),
}
READERS = {
    ".safetensors": read_table,
    ".bin": read_torch_pickle,
    ".ckpt": read_torch_pickle,
    ".pt": read_torch_pickle,
    ".pth": read_torch_pickle,
    ".msgpack": read_flax_msgpack,
}
# Preferred order of variants where no plain file lies in the folder.
VARIANTS = ("fp32", "bf16", "fp16")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def find_weights(folder: pathlib.Path, *, variant: str | None = None) -> pathlib.Path:
    """The weights file, or index of shards, that counts in a component's `folder`.

    With `variant` that one; without, the plain file if there is one, else a variant (fp32, bf16 and
    fp16 before others). Raises InputError if there is none or the choice is open.
    """
    found = variants(folder)
    if variant is not None:
        if variant not in found:
            raise InputError(f"{folder}: got {_listing(folder)}, expected variant {variant!r}")
        return found[variant]
    for name in ("", *VARIANTS):
        if name in found:
            return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        names = ", ".join(sorted(found))
        raise InputError(f"{folder}: got variants {names}, expected a choice of one (variant)")
    wanted = " or ".join(f"{stem}.safetensors" for stem in STEMS[".safetensors"])
    raise InputError(f"{folder}: got {_listing(folder)}, expected {wanted}")


def variants(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The weights in `folder` by variant; the plain ones have the name ""."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {variant: folder / name for variant, name in named_variants(names).items()}


def named_variants(names: Iterable[str]) -> dict[str, str]:
    """The weights among a folder's file `names` by variant, of the best format that is there."""
    # Indices come second so that one whole file wins over shards of the same weights.
    ordered = sorted(names, key=lambda name: (".index" in name, name))
    for extension, stems in STEMS.items():
        found: dict[str, str] = {}
        for stem in stems:
            pattern = re.compile(
                rf"{stem}(?P<a>\.[^.]+)?{re.escape(extension)}"
                r"(\.index(?P<b>\.[^.]+)?\.json)?"
            )
            for name in ordered:
                match = pattern.fullmatch(name)
                if match and not _SHARD.search(match["a"] or ""):
                    found.setdefault((match["a"] or match["b"] or "").removeprefix("."), name)
        if found:
            return found
    return {}


def read_weights(path: pathlib.Path) -> dict[str, TensorInfo]:
    """The table of tensors behind a weights file or an index of shards, with scales that they have.

    A file is read by its extension; InputError for one that is not in READERS.
    """
    return with_scales(_read_stored(path))


def _read_stored(path: pathlib.Path) -> dict[str, TensorInfo]:
    """All that is stored, scales and marks of 8-bit floats among it."""
    if path.suffix == ".json":
        return _read_index(path)
    if path.suffix not in READERS:
        got = path.suffix or "no extension" if path.exists() else "no such file"
        raise InputError(f"{path}: got {got}, expected {_known()}")
    return READERS[path.suffix](path)


def digest(path: pathlib.Path) -> str:
    """A fingerprint of all bytes behind a weights file or an index of shards."""
    files = sorted({path, *(entry.path for entry in read_weights(path).values())})
    parts = []
    for file in files:
        with file.open("rb") as opened:
            parts.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _known() -> str:
    return ", ".join(READERS)


def _read_index(path: pathlib.Path) -> dict[str, TensorInfo]:
    """The tensors of all shards; index and shards must agree on what lies where."""
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{path}: got no weight_map, expected the shard of every tensor")
    shards: dict[str, set[str]] = defaultdict(set)
    for name, shard in places.items():
        # A shard lies beside its index: a path could lead anywhere on the machine.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.(safetensors|bin)", shard):
            raise InputError(
                f"{path}: got the shard {shard!r:.80} for {name}, "
                "expected the name of a .safetensors file"
            )
        shards[shard].add(name)
    entries: dict[str, TensorInfo] = {}
    for shard, names in sorted(shards.items()):
        table = _read_stored(path.parent / shard)
        if table.keys() != names:
            wrong = ", ".join(sorted(table.keys() ^ names)[:3])
            raise InputError(f"{path.parent / shard}: got other tensors than {path.name}: {wrong}")
        entries |= table
    return entries


def _listing(folder: pathlib.Path) -> str:
    """What a folder without the wanted weights has instead, for the error."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(p.name for p in folder.iterdir())
    weights = [n for n in names if n.endswith((".safetensors", ".bin", ".msgpack", ".ckpt", ".pt"))]
    return ", ".join((weights or names)[:4]) or "an empty folder"
