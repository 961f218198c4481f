"""Which files hold a component's weights: plain, a variant, or shards with an index.

File names are diffusers' and transformers': `STEM.safetensors`, `STEM.VARIANT.safetensors`,
`STEM.safetensors.index.json`, `STEM.safetensors.index.VARIANT.json`, where STEM is
`diffusion_pytorch_model` or `model`.
"""

import pathlib
import re
from collections import defaultdict

from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.tensors import Entry, read_table
from jaxdiff.core.errors import InputError

STEMS = ("diffusion_pytorch_model", "model")
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
        raise InputError(f"{folder}: got variants {', '.join(sorted(found))}, expected one named")
    wanted = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    raise InputError(f"{folder}: got {_listing(folder)}, expected {wanted}")


def variants(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The weights in `folder` by variant; the plain ones have the name ""."""
    found: dict[str, pathlib.Path] = {}
    for stem in STEMS:
        # Indices come second so that one whole file wins over shards of the same weights.
        files = sorted(folder.glob(f"{stem}*.safetensors"))
        for path in [*files, *sorted(folder.glob(f"{stem}*.safetensors.index*.json"))]:
            name = path.name.removeprefix(stem).replace(".safetensors", "", 1)
            name = name.removesuffix(".json").replace(".index", "", 1)
            if (name == "" or name.startswith(".")) and not _SHARD.search(name):
                found.setdefault(name.removeprefix("."), path)
    return found


def read_weights(path: pathlib.Path) -> dict[str, Entry]:
    """The table of tensors behind a weights file or an index of shards."""
    return read_table(path) if path.suffix == ".safetensors" else _read_index(path)


def _read_index(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of all shards; index and shards must agree on what lies where."""
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{path}: got no weight_map, expected the shard of every tensor")
    shards: dict[str, set[str]] = defaultdict(set)
    for name, shard in places.items():
        # A shard lies beside its index: a path could lead anywhere on the machine.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise InputError(
                f"{path}: got the shard {shard!r:.80} for {name}, "
                "expected the name of a .safetensors file"
            )
        shards[shard].add(name)
    entries: dict[str, Entry] = {}
    for shard, names in sorted(shards.items()):
        table = read_table(path.parent / shard)
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
