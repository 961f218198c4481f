"""The layout of UNets of guided diffusion (2105.05233), as GLIDE and those after it have it.

Blocks are counted through, residual blocks change the resolution, and attention is convolutions of
one matrix each: `qkv` has the rows of queries, keys and values of the first head, then those of the
second; `encoder_kv` likewise the keys and values of a context. Names here are those of diffusers.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from jaxdiff.checkpoints.infer_config import HEAD_WIDTH
from jaxdiff.checkpoints.key_tables import join_heads, split_heads
from jaxdiff.checkpoints.ldm_reader import MIDDLES, RESNET, UNET
from jaxdiff.checkpoints.safetensors import LazyTensor, TensorInfo
from jaxdiff.core.errors import InputError

# The modules of an attention layer in diffusers, by that of the original.
ATTENTION: Mapping[str, tuple[str, ...]] = {
    "norm": ("group_norm",),
    "qkv": ("to_q", "to_k", "to_v"),
    "encoder_kv": ("add_k_proj", "add_v_proj"),
    "proj_out": ("to_out.0",),
}
_PLACE = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)|middle_block\.([012])\.(.+)")
_UP = re.compile(r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight")


def unet_from_original(entries: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a UNet2DConditionModel of those of the original.

    Names that are no UNet's stay. InputError for rows that are no whole heads of HEAD_WIDTH.
    """
    # The first stage on the way up ends in the first block that doubles the resolution.
    ends = [int(match[1]) for name in entries if (match := _UP.fullmatch(name))]
    numbers = [int(m[2]) for name in entries if (m := _PLACE.match(name)) and m[1] == "output"]
    layers = min(ends, default=max(numbers, default=0))
    found: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        names = _modules(module, layers)
        for new, part in zip(names, _parts(entry, len(names)), strict=True):
            key = f"{new}.{leaf}" if module else name
            if key in found:
                raise InputError(f"{entry.path}: got {name} and {found[key].name}, expected one")
            found[key] = part
    return found


def unet_to_original(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The inverse of `unet_from_original`."""
    numbers = [int(m[1]) for n in tensors if (m := re.match(r"up_blocks\.0\.resnets\.(\d+)\.", n))]
    layers = max(numbers, default=0)
    attended = {m[1] for n in tensors if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))}
    whole = {parts[0]: original for original, parts in ATTENTION.items()}
    others = {part for parts in ATTENTION.values() for part in parts[1:]}
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        match = re.match(r"(.+\.attentions\.\d+)\.(.+)", module)
        if match is None:
            found[f"{_original(module, layers, attended)}.{leaf}"] = tensor
        elif match[2] not in others:
            original = whole[match[2]]
            parts = [tensors[f"{match[1]}.{part}.{leaf}"] for part in ATTENTION[original]]
            joined = tensor if len(parts) == 1 else join_heads(parts, HEAD_WIDTH)
            place = _original(match[1], layers, attended)
            found[f"{place}.{original}.{leaf}"] = _convolved(joined)
    return found


def _modules(module: str, layers: int) -> tuple[str, ...]:
    """The modules in diffusers of an original one, in a UNet of `layers` layers on the way down."""
    if module in UNET:
        return (UNET[module],)
    if not (match := _PLACE.fullmatch(module)):
        return (module,)
    suffix = match[4] or match[6]
    if match[5] is not None:
        place = f"mid_block.{MIDDLES[int(match[5])]}"
    else:
        down, inner = match[1] == "input", int(match[3])
        stage, layer = divmod(int(match[2]) - down, layers + 1)
        way = "down" if down else "up"
        changes = layer == layers if down else inner > 0
        if suffix not in RESNET:
            kind = f"attentions.{layer}"
        elif changes:
            kind = f"{way}samplers.0"
        else:
            kind = f"resnets.{layer}"
        place = f"{way}_blocks.{stage}.{kind}"
    names = (RESNET[suffix],) if suffix in RESNET else ATTENTION.get(suffix, (suffix,))
    return tuple(f"{place}.{name}" for name in names)


def _parts(entry: TensorInfo, count: int) -> list[TensorInfo]:
    """A tensor as matrices, where it is a convolution of one pixel of a row, in `count` parts."""
    if len(entry.shape) == 3 and entry.shape[2] == 1:
        entry = replace(entry, shape=entry.shape[:2])
    return [entry] if count == 1 else split_heads(entry, count, HEAD_WIDTH)


def _original(module: str, layers: int, attended: set[str]) -> str:
    """The original name of a module; `attended` are the numbers of up blocks with attention."""
    tops = {new: old for old, new in UNET.items()}
    if module in tops:
        return tops[module]
    resnet = {new: old for old, new in RESNET.items()}
    if middle := re.fullmatch(r"mid_block\.((?:resnets|attentions)\.\d)(?:\.(.+))?", module):
        place, suffix = f"middle_block.{MIDDLES.index(middle[1])}", middle[2]
    elif match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.(.+))?", module):
        down, stage, kind, layer, suffix = match[1] == "down", *match.groups()[1:]
        inner = int(kind == "attentions")
        number = int(stage) * (layers + 1) + int(layer) + down
        if kind.endswith("samplers"):
            number = int(stage) * (layers + 1) + layers + down
            inner = 0 if down else 1 + (stage in attended)
        place = f"{'input' if down else 'output'}_blocks.{number}.{inner}"
    else:
        return module
    return place if suffix is None else f"{place}.{resnet.get(suffix, suffix)}"


def _convolved(tensor: LazyTensor) -> LazyTensor:
    """A matrix as a convolution of one pixel of a row; a vector as it is."""
    if len(tensor.shape) != 2:
        return tensor

    def fetch() -> np.ndarray:
        return tensor.fetch()[:, :, None]

    return replace(tensor, shape=(*tensor.shape, 1), fetch=fetch)
