"""Writer of the original (LDM) layout: from the names of diffusers and transformers.

`ldm_reader` is its inverse.
"""

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

import numpy as np

from jaxdiff.checkpoints.ldm_reader import LAYER_PARTS, MIDDLES, RESNET, TEXT, UNET, VAE_ATTENTION
from jaxdiff.checkpoints.safetensors import LazyTensor


def unet_to_ldm(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A UNet's tensors in the original layout."""
    spelled = unet_to_ldm_keys(tensors)
    return {spelled[name]: tensor for name, tensor in tensors.items()}


def unet_to_ldm_keys(names: Iterable[str]) -> dict[str, str]:
    """The original name of every tensor of a UNet, by its name in diffusers: `unet` backwards."""
    names = list(names)
    layers = [int(m[1]) for n in names if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", n))]
    blocks = max(layers, default=0) + 2  # with the downsampler
    attended = {m[1] for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))}
    return {name: _unet_original(name, blocks, attended) for name in names}


def _unet_original(name: str, blocks: int, attended: Set[str]) -> str:
    """One name; `attended` are the numbers of the upward stages with attention."""
    module, _, leaf = name.rpartition(".")
    if module in UNET.values():
        return f"{_inverse(UNET)[module]}.{leaf}"
    if middle := re.match(r"mid_block\.(resnets\.0|attentions\.0|resnets\.1)\.(.+)", name):
        return f"middle_block.{MIDDLES.index(middle[1])}.{_original_part(middle[2])}"
    place = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not place:
        return name
    way, stage, kind, layer, suffix = place[1], place[2], place[3], int(place[4]), place[5]
    if kind == "downsamplers":
        return f"input_blocks.{(int(stage) + 1) * blocks}.0.{suffix.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(int(stage) + 1) * blocks - 1}.{1 + (stage in attended)}.{suffix}"
    number = int(stage) * blocks + layer + (way == "down")
    blocks_name = "input" if way == "down" else "output"
    return f"{blocks_name}_blocks.{number}.{int(kind == 'attentions')}.{_original_part(suffix)}"


def _original_part(suffix: str) -> str:
    module, _, leaf = suffix.rpartition(".")
    return f"{_inverse(RESNET).get(module, module)}.{leaf}"


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


_VAE = (
    (re.compile(r"(\.attentions\.\d+)\.group_norm\."), r"\1.norm."),
    (re.compile(r"(\.attentions\.\d+)\.to_([qkv])\."), r"\1.\2."),
    (re.compile(r"(\.attentions\.\d+)\.to_out\.0\."), r"\1.proj_out."),
    (re.compile(r"coder\.mid_block\.attentions\.0\."), "coder.mid.attn_1."),
    (re.compile(r"coder\.mid_block\.resnets\.0\."), "coder.mid.block_1."),
    (re.compile(r"coder\.mid_block\.resnets\.1\."), "coder.mid.block_2."),
    (re.compile(r"^encoder\.down_blocks\.(\d+)\.resnets\."), r"encoder.down.\1.block."),
    (re.compile(r"^encoder\.down_blocks\.(\d+)\.attentions\."), r"encoder.down.\1.attn."),
    (
        re.compile(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\."),
        r"encoder.down.\1.downsample.",
    ),
    (re.compile(r"\.conv_shortcut\."), ".nin_shortcut."),
    (re.compile(r"\.conv_norm_out\."), ".norm_out."),
)
_UP = re.compile(r"^decoder\.up_blocks\.(\d+)\.(resnets|attentions|upsamplers\.0)\.")
_UP_PARTS = {"resnets": "block", "attentions": "attn", "upsamplers.0": "upsample"}


def vae_to_ldm(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A VAE's tensors in the original layout, where attention is 1x1 convolutions."""
    stages = {int(m[1]) for name in tensors if (m := _UP.match(name))}

    def stage(m: re.Match[str]) -> str:
        return f"decoder.up.{len(stages) - 1 - int(m[1])}.{_UP_PARTS[m[2]]}."

    found = {}
    for name, tensor in tensors.items():
        attention = VAE_ATTENTION.search(name) and len(tensor.shape) == 2
        for pattern, spelling in _VAE:
            name = pattern.sub(spelling, name)
        found[_UP.sub(stage, name)] = _convolved(tensor) if attention else tensor
    return found


def _convolved(tensor: LazyTensor) -> LazyTensor:
    return replace(
        tensor, shape=(*tensor.shape, 1, 1), fetch=lambda: tensor.fetch()[:, :, None, None]
    )


_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def clip_to_open_clip(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A text encoder's tensors as OpenCLIP names them: queries, keys and values in one matrix."""
    parts, texts = ({new: old for old, new in table.items()} for table in (LAYER_PARTS, TEXT))
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        layer = _LAYER.match(name)
        if name == "text_projection.weight":
            found["text_projection"] = _transposed(tensor)
        elif layer is None:
            found[texts[name.removeprefix("text_model.")]] = tensor
        elif layer[2] == "self_attn.q_proj":
            place = f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"
            three = [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            found[place] = _joined(three)
        elif layer[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            found[f"transformer.resblocks.{layer[1]}.{parts[layer[2]]}.{layer[3]}"] = tensor
    return found


def _transposed(tensor: LazyTensor) -> LazyTensor:
    return replace(tensor, shape=tensor.shape[::-1], fetch=lambda: tensor.fetch().T)


def _joined(tensors: list[LazyTensor]) -> LazyTensor:
    first = tensors[0]
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return replace(first, shape=shape, fetch=lambda: np.concatenate([t.fetch() for t in tensors]))
