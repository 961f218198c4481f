"""Information on LoRA and textual inversion files, from their headers alone."""

import dataclasses
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from jaxdiff.checkpoints.inversion_names import PAIR, token_name
from jaxdiff.checkpoints.lora_names import Name, parse
from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.checkpoints.single_file_layouts import REFINER, SD1, SD2, SDXL

# Widths of what the UNets attend to; those of the text encoders are among them.
WIDTHS = {768: SD1.name, 1024: SD2.name, 2048: SDXL.name, 1280: REFINER.name}
_ATTENDS = re.compile(r"attn2[._]to_[kv]$")
# Changes of weights in other forms, which are not read.
_OTHERS = {
    "LoHa": re.compile(r"\.hada_\w+$"),
    "LoKr": re.compile(r"\.lokr_\w+$"),
    "DoRA": re.compile(r"\.dora_scale$|\.lora_magnitude_vector(\.\w+)*$"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAInfo:
    """A LoRA's form."""

    spelling: str  # "PEFT", "diffusers", "kohya", or several with commas
    ranks: tuple[int, ...]
    modules: Mapping[str, int]  # how many are changed, by network
    convolutions: bool  # whether kernels beyond 1 x 1 are changed too (LoCon)
    unread: Mapping[str, int]  # tensors of other forms and names, by what they are


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextualInversionInfo:
    """A textual inversion's form."""

    token: str
    vectors: int
    widths: Mapping[str, int]  # by text encoder


class AdapterInfo(NamedTuple):
    """A file that changes a model."""

    layout: str  # "LoRA" or "textual inversion"
    family: str  # of the models that it fits; "unknown" where the table does not tell
    facts: LoRAInfo | TextualInversionInfo
    groups: Mapping[str, Mapping[str, TensorInfo]]  # its tensors by network


def find_adapter(path: pathlib.Path, entries: Mapping[str, TensorInfo]) -> AdapterInfo | None:
    """The LoRA or textual inversion whose table this is; None if it is neither."""
    return _lora(entries) or _textual_inversion(path, entries)


def _lora(entries: Mapping[str, TensorInfo]) -> AdapterInfo | None:
    names = {name: parse(name) for name in entries}
    known = {name: found for name, found in names.items() if found is not None}
    unread = Counter(_kind(name) for name in names.keys() - known.keys())
    downs = {name: found for name, found in known.items() if found.role == "down"}
    if not downs and not unread.keys() & _OTHERS.keys():
        return None
    groups: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    modules: dict[str, set[str]] = defaultdict(set)
    for name, found in sorted(known.items(), key=lambda item: item[1].component):
        groups[found.component][name] = entries[name]
        modules[found.component].add(found.module)
    for name in sorted(names.keys() - known.keys()):
        groups["unread"][name] = entries[name]
    facts = LoRAInfo(
        spelling=", ".join(sorted({found.spelling for found in known.values()})),
        ranks=tuple(sorted({entries[name].shape[0] for name in downs if entries[name].shape})),
        modules={component: len(paths) for component, paths in modules.items()},
        convolutions=any(_is_wide(entries[name], found) for name, found in known.items()),
        unread=dict(sorted(unread.items())),
    )
    return AdapterInfo("LoRA", _lora_family(entries, downs), facts, groups)


def _kind(name: str) -> str:
    return next((kind for kind, form in _OTHERS.items() if form.search(name)), "others")


def _is_wide(entry: TensorInfo, name: Name) -> bool:
    return name.role == "mid" or (name.role == "down" and any(s > 1 for s in entry.shape[2:]))


def _lora_family(entries: Mapping[str, TensorInfo], downs: Mapping[str, Name]) -> str:
    """What the factors fit: by the width of cross-attention, or by the text encoders."""
    for name, found in downs.items():
        shape = entries[name].shape
        if found.component == "unet" and _ATTENDS.search(found.module) and len(shape) > 1:
            return WIDTHS.get(shape[1], "unknown")
    if any(found.component == "text_encoder_2" for found in downs.values()):
        return SDXL.name
    return "unknown"


def _textual_inversion(path: pathlib.Path, entries: Mapping[str, TensorInfo]) -> AdapterInfo | None:
    token = token_name(path, entries)
    shapes = {name: entry.shape for name, entry in entries.items()}
    if token is None or any(len(shape) not in (1, 2) for shape in shapes.values()):
        return None
    if len(shapes) == len(PAIR):
        family, places = SDXL.name, PAIR
    else:
        ((name, shape),) = shapes.items()
        family = WIDTHS.get(shape[-1], "unknown")
        places = {name: "text_encoder_2" if family == REFINER.name else "text_encoder"}
    facts = TextualInversionInfo(
        token=token,
        vectors=max(shape[0] if len(shape) == 2 else 1 for shape in shapes.values()),
        widths={place: shapes[name][-1] for name, place in places.items()},
    )
    groups = {place: {name: entries[name]} for name, place in places.items()}
    return AdapterInfo("textual inversion", family, facts, groups)
