"""The original layout of Stable Diffusion, as CompVis and Stability AI published it.

Networks carry the names of the code that trained them: the UNet counts its blocks through, the VAE
counts the decoder's stages from the end, OpenCLIP keeps queries, keys and values in one matrix.
Here such tensors get the names of diffusers and transformers; their bytes stay where they are.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.core.errors import InputError

Entries = dict[str, TensorInfo]

UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.\d+\.(.+)")
_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")
MIDDLES = ("resnets.0", "attentions.0", "resnets.1")

_VAE = (
    (re.compile(r"^encoder\.down\.(\d+)\.block\.(\d+)\."), r"encoder.down_blocks.\1.resnets.\2."),
    (re.compile(r"^encoder\.down\.(\d+)\.downsample\."), r"encoder.down_blocks.\1.downsamplers.0."),
    (re.compile(r"^decoder\.up\.(\d+)\.block\.(\d+)\."), r"decoder.up_blocks.\1.resnets.\2."),
    (re.compile(r"^decoder\.up\.(\d+)\.upsample\."), r"decoder.up_blocks.\1.upsamplers.0."),
    (re.compile(r"^encoder\.down\.(\d+)\.attn\."), r"encoder.down_blocks.\1.attentions."),
    (re.compile(r"^decoder\.up\.(\d+)\.attn\."), r"decoder.up_blocks.\1.attentions."),
    (re.compile(r"\.mid\.block_1\."), ".mid_block.resnets.0."),
    (re.compile(r"\.mid\.block_2\."), ".mid_block.resnets.1."),
    (re.compile(r"\.mid\.attn_1\."), ".mid_block.attentions.0."),
    # Converters of 2023 left diffusers' names inside: to_q, to_out.0 and the like.
    (re.compile(r"(\.attentions\.\d+)\.norm\."), r"\1.group_norm."),
    (re.compile(r"(\.attentions\.\d+)\.([qkv])\."), r"\1.to_\2."),
    (re.compile(r"(\.attentions\.\d+)\.proj_out\."), r"\1.to_out.0."),
    (re.compile(r"\.nin_shortcut\."), ".conv_shortcut."),
    (re.compile(r"\.norm_out\."), ".conv_norm_out."),
)
VAE_ATTENTION = re.compile(r"\.attentions\.\d+\.to_")  # matrices in diffusers
_STAGE = re.compile(r"decoder\.up_blocks\.(\d+)\.")

TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IN_PROJ = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def unet_from_ldm(entries: Mapping[str, TensorInfo]) -> Entries:
    """A UNet's tensors under the names of diffusers' UNet2DConditionModel."""
    inputs = {int(m[2]): m[3] for name in entries if (m := _BLOCK.match(name)) and m[1] == "input"}
    # The first stage ends in the first downsampler; a single stage has none.
    ends = [number for number in inputs if f"input_blocks.{number}.0.op.weight" in entries]
    blocks = min(ends, default=max(inputs, default=1))
    return _renamed(entries, lambda name: unet_name(name, blocks))


def unet_name(name: str, blocks: int) -> str:
    """One name, where every stage of the UNet has so many numbered `blocks`."""
    module, _, leaf = name.rpartition(".")
    if module in UNET:
        return f"{UNET[module]}.{leaf}"
    if middle := _MIDDLE.match(name):
        return f"mid_block.{MIDDLES[int(middle[1])]}.{_resnet_part(middle[2]) or middle[2]}"
    if not (block := _BLOCK.match(name)):
        return name
    down, number, suffix = block[1] == "input", int(block[2]), block[3]
    stage, layer = divmod(number - 1 if down else number, blocks)
    place = f"{'down' if down else 'up'}_blocks.{stage}"
    if suffix.startswith("op."):
        return f"{place}.downsamplers.0.conv.{suffix.removeprefix('op.')}"
    if suffix.startswith("conv."):
        return f"{place}.upsamplers.0.{suffix}"
    if part := _resnet_part(suffix):
        return f"{place}.resnets.{layer}.{part}"
    return f"{place}.attentions.{layer}.{suffix}"


def _resnet_part(suffix: str) -> str | None:
    module, _, leaf = suffix.rpartition(".")
    return f"{RESNET[module]}.{leaf}" if module in RESNET else None


def vae_from_ldm(entries: Mapping[str, TensorInfo]) -> Entries:
    """A VAE's tensors under the names of diffusers' AutoencoderKL; its attention as matrices."""
    stages = {int(m[1]) for name in entries if (m := re.match(r"decoder\.up\.(\d+)\.", name))}

    def rename(name: str) -> str:
        for pattern, spelling in _VAE:
            name = pattern.sub(spelling, name)
        return _STAGE.sub(lambda m: f"decoder.up_blocks.{len(stages) - 1 - int(m[1])}.", name)

    renamed = _renamed(entries, rename)
    return {
        name: replace(entry, shape=entry.shape[:2])
        if VAE_ATTENTION.search(name) and entry.shape[2:] == (1, 1)
        else entry
        for name, entry in renamed.items()
    }


def clip_from_open_clip(entries: Mapping[str, TensorInfo], *, depth: int | None = None) -> Entries:
    """OpenCLIP's text tower under the names of transformers' CLIPTextModel.

    `depth` keeps so many layers and no projection: Stable Diffusion 2 reads the output of the last
    layer but one.
    """
    found: Entries = {}
    for name, entry in entries.items():
        if name == "text_projection":
            if depth is None:
                # OpenCLIP multiplies from the right, x P; transformers keeps a linear layer.
                found["text_projection.weight"] = entry.transposed()
        elif joint := _IN_PROJ.match(name):
            if depth is None or int(joint[1]) < depth:
                found |= _three(f"text_model.encoder.layers.{joint[1]}.self_attn", joint[2], entry)
        elif layer := _LAYER.match(name):
            if depth is None or int(layer[1]) < depth:
                part = LAYER_PARTS.get(layer[2], layer[2])
                found[f"text_model.encoder.layers.{layer[1]}.{part}.{layer[3]}"] = entry
        else:
            found[f"text_model.{TEXT.get(name, name)}"] = entry
    return found


def _three(module: str, leaf: str, entry: TensorInfo) -> Entries:
    """Queries, keys and values, which lie below each other in one tensor."""
    if not entry.shape or entry.shape[0] % 3:
        raise InputError(f"{entry.path}: got {entry.name} {entry.shape}, expected 3 equal parts")
    width = entry.shape[0] // 3
    return {
        f"{module}.{part}_proj.{leaf}": entry.rows(i * width, (i + 1) * width)
        for i, part in enumerate("qkv")
    }


def _renamed(entries: Mapping[str, TensorInfo], rename) -> Entries:
    """`entries` under new names, which must stay different."""
    found: Entries = {}
    for name, entry in entries.items():
        new = rename(name)
        if new in found:
            raise InputError(f"{entry.path}: got {name} and {found[new].name}, expected one")
        found[new] = entry
    return found
