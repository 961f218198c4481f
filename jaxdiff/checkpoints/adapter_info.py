"""Information on LoRA and textual inversion files, from their headers alone."""

import dataclasses
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from jaxdiff.checkpoints.inversion_names import BUNDLED, PAIR, T5, bundled, embeddings, token_name
from jaxdiff.checkpoints.layout_stable_diffusion import REFINER, SD1, SD2, SDXL
from jaxdiff.checkpoints.lora_formats import UNSUPPORTED, kind_of, unsupported
from jaxdiff.checkpoints.lora_names import TRANSFORMER, Name, parse
from jaxdiff.checkpoints.safetensors import TensorInfo

# Widths of what the UNets attend to; those of the text encoders are among them.
WIDTHS = {768: SD1.name, 1024: SD2.name, 2048: SDXL.name, 1280: REFINER.name}
# Widths of transformers whose blocks have names that several families share.
TRANSFORMER_WIDTHS = {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3", 3072: "FLUX.1"}
_TRANSFORMERS = {
    "Chroma": re.compile(r"distilled_guidance_layer[._]"),
    "Stable Diffusion 3": re.compile(r"joint_blocks[._]|\w+[._]\d+[._]attn2[._]|pos_embed[._]"),
    "FLUX.1": re.compile(r"(double|single)_blocks[._]|single_transformer_blocks[._]"),
}
_QUERIES = re.compile(r"attn[._](to|add)_q(_proj)?$")
UNKNOWN = "unknown"
_ATTENDS = re.compile(r"attn2[._]to_[kv]$")
# Tensors whose first axis is the rank, and those whose second is a layer's width.
_RANKS = frozenset({"down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"})
_WIDTHS = frozenset({"down", "hada_w1_b", "diff"})
_EXTRAS = frozenset({"alpha", "rescale", "on_input"})  # no adapter has them alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAInfo:
    """A LoRA's form."""

    spelling: str  # "PEFT", "diffusers", "kohya", "LyCORIS", "ComfyUI", or several with commas
    formats: Mapping[str, int]  # how many modules are changed, by format ("LoRA", "LoHa", ...)
    ranks: tuple[int, ...]
    modules: Mapping[str, int]  # how many are changed, by network
    convolutions: bool  # whether kernels beyond 1 x 1 are changed too (LoCon)
    tokens: tuple[str, ...]  # of the embeddings that come with it
    unread: Mapping[str, int]  # tensors of other formats and names, by what they are


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextualInversionInfo:
    """A textual inversion's form."""

    token: str
    vectors: int
    widths: Mapping[str, int]  # by text encoder


class AdapterInfo(NamedTuple):
    """A file that changes a model."""

    layout: str  # "LoRA" or "textual inversion"
    family: str  # of the models that it fits; UNKNOWN where the table does not tell
    facts: LoRAInfo | TextualInversionInfo
    groups: Mapping[str, Mapping[str, TensorInfo]]  # its tensors by network


def find_adapter(path: pathlib.Path, entries: Mapping[str, TensorInfo]) -> AdapterInfo | None:
    """The LoRA or textual inversion whose table this is; None if it is neither."""
    return _lora(entries) or _textual_inversion(path, entries)


def _lora(entries: Mapping[str, TensorInfo]) -> AdapterInfo | None:
    names = {name: parse(name) for name in entries}
    known = {name: found for name, found in names.items() if found is not None}
    others = {name: _kind(name) for name in entries if name not in known or unsupported(name)}
    roles = {found.role for found in known.values()}
    if not roles - _EXTRAS and not UNSUPPORTED.keys() & others.values():
        return None
    groups: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    modules: dict[tuple[str, str], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, found in sorted(known.items(), key=lambda item: item[1].component):
        groups[found.component][name] = entries[name]
        modules[found.component, found.module][found.role] = entries[name].shape
    for name, kind in sorted(others.items()):
        groups["embeddings" if kind == BUNDLED else "unread"][name] = entries[name]
    facts = LoRAInfo(
        spelling=", ".join(sorted({found.spelling for found in known.values()})),
        formats=dict(sorted(Counter(map(kind_of, modules.values())).items())),
        ranks=tuple(
            sorted({r for n, f in known.items() if f.role in _RANKS for r in entries[n].shape[:1]})
        ),
        modules=dict(Counter(component for component, _ in modules)),
        convolutions=any(_is_wide(entries[name], found) for name, found in known.items()),
        tokens=tuple(sorted(bundled(entries))),
        unread=dict(sorted(Counter(k for k in others.values() if k != BUNDLED).items())),
    )
    return AdapterInfo("LoRA", _lora_family(entries, known), facts, groups)


def _kind(name: str) -> str:
    """What to call a tensor that is no part of a change of weights."""
    return BUNDLED if name.startswith(BUNDLED) else unsupported(name) or "others"


def _is_wide(entry: TensorInfo, name: Name) -> bool:
    return name.role == "mid" or (name.role == "down" and any(s > 1 for s in entry.shape[2:]))


def _lora_family(entries: Mapping[str, TensorInfo], names: Mapping[str, Name]) -> str:
    """What the changes fit: by the width of cross-attention, the blocks or the text encoders."""
    if any(found.component == TRANSFORMER for found in names.values()):
        return _transformer_family(entries, names)
    for name, found in names.items():
        shape = entries[name].shape
        attends = found.component == "unet" and _ATTENDS.search(found.module)
        if attends and found.role in _WIDTHS and len(shape) > 1:
            return WIDTHS.get(shape[1], UNKNOWN)
    if any(found.component == "text_encoder_2" for found in names.values()):
        return SDXL.name
    return UNKNOWN


def _transformer_family(entries: Mapping[str, TensorInfo], names: Mapping[str, Name]) -> str:
    """The family of a transformer, by the names of its modules, or by its width."""
    modules = {found.module for found in names.values() if found.component == TRANSFORMER}
    for family, form in _TRANSFORMERS.items():
        if any(map(form.match, modules)):
            return family
    queries = {n for n, found in names.items() if _QUERIES.search(found.module)}
    downs = [entries[n].shape for n in queries if names[n].role in _WIDTHS]
    widths = {shape[1] for shape in downs if len(shape) > 1}
    return TRANSFORMER_WIDTHS.get(min(widths, default=0), UNKNOWN)


def _textual_inversion(path: pathlib.Path, entries: Mapping[str, TensorInfo]) -> AdapterInfo | None:
    token = token_name(path, entries)
    shapes = {name: entries[name].shape for name in embeddings(entries)}
    if token is None or any(len(shape) not in (1, 2) for shape in shapes.values()):
        return None
    if len(shapes) > 1:
        t5 = {name for name in shapes if name in T5}
        both = PAIR.keys() <= shapes.keys()
        family = SDXL.name if not t5 else "Stable Diffusion 3" if both else "FLUX.1"
        places = {name: place for name, place in PAIR.items() if name in shapes}
        places |= dict.fromkeys(t5, "text_encoder_3" if both else "text_encoder_2")
    else:
        ((name, shape),) = shapes.items()
        family = WIDTHS.get(shape[-1], UNKNOWN)
        places = {name: "text_encoder_2" if family == REFINER.name else "text_encoder"}
    facts = TextualInversionInfo(
        token=token,
        vectors=max(shape[0] if len(shape) == 2 else 1 for shape in shapes.values()),
        widths={place: shapes[name][-1] for name, place in places.items()},
    )
    groups = {place: {name: entries[name]} for name, place in places.items()}
    return AdapterInfo("textual inversion", family, facts, groups)
