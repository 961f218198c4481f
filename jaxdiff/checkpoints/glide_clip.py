"""GLIDE's CLIP of noisy images (2112.10741, section 3.2): two files of the original code.

Its vision tower has in place of the class token one for each timestep. It becomes a CLIPModel.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from jaxdiff.checkpoints.clip_vocabulary import vocabulary
from jaxdiff.checkpoints.components import build
from jaxdiff.checkpoints.infer_config import HEAD_WIDTH, count_modules, tensor_shape
from jaxdiff.checkpoints.key_tables import KeyTable, Rule, same
from jaxdiff.checkpoints.loading import Placement
from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.errors import InputError
from jaxdiff.models.clip import CLIPModel
from jaxdiff.models.clip_config import CLIPTextConfig, NoisyCLIPVisionConfig

TEXT_FILE, IMAGE_FILE = "clip_text_enc", "clip_image_enc"
ENDINGS = (".pt", ".safetensors")
LOGIT_SCALE = math.log(100)  # which is in no file
# The tower's names before its embeddings, and the last norm and projection.
_TOWERS = {
    TEXT_FILE: ("text_model", "final_layer_norm", "text_projection"),
    IMAGE_FILE: ("vision_model", "post_layernorm", "visual_projection"),
}
_LAYERS = {
    "f_attn.ln.g": "layer_norm1.weight",
    "f_attn.ln.b": "layer_norm1.bias",
    **{f"f_attn.f_{x}.w": f"self_attn.{x}_proj.weight" for x in "qkv"},
    **{f"f_attn.f_{x}.b": f"self_attn.{x}_proj.bias" for x in "qv"},
    "f_attn.f_c.w": "self_attn.out_proj.weight",
    "f_attn.f_c.b": "self_attn.out_proj.bias",
    "f_mlp.ln.g": "layer_norm2.weight",
    "f_mlp.ln.b": "layer_norm2.bias",
    **{f"f_mlp.f_{i}.w": f"mlp.fc{i}.weight" for i in (1, 2)},
    **{f"f_mlp.f_{i}.b": f"mlp.fc{i}.bias" for i in (1, 2)},
}


def _rules(file: str) -> Iterable[Rule]:
    tower, norm, projection = _TOWERS[file]
    yield same("blocks.input.w_voc", f"{tower}.embeddings.token_embedding.weight")
    yield same("blocks.input.w_pos", f"{tower}.embeddings.position_embedding.weight")
    yield same("blocks.input.w_t", f"{tower}.embeddings.class_embedding")
    yield same("blocks.input.patch_proj", f"{tower}.embeddings.patch_embedding.weight")
    yield same("blocks.input.ln.g", f"{tower}.pre_layrnorm.weight")
    yield same("blocks.input.ln.b", f"{tower}.pre_layrnorm.bias")
    for original, name in _LAYERS.items():
        yield same(f"blocks.block_*.{original}", f"{tower}.encoder.layers.*.{name}")
    yield same("blocks.output.ln.g", f"{tower}.{norm}.weight")
    yield same("blocks.output.ln.b", f"{tower}.{norm}.bias")
    yield same("blocks.output.f.w", f"{projection}.weight")


def is_glide_clip(folder: pathlib.Path) -> bool:
    """Whether the folder has either of its files."""
    return any(_find(folder, name) is not None for name in _TOWERS)


def read_glide_clip(folder: pathlib.Path, *, sharding: Placement = None) -> CLIPModel:
    """The CLIP whose two files are in the folder; InputError for a missing or broken one."""
    entries: dict[str, TensorInfo] = {}
    for name, (tower, *_) in _TOWERS.items():
        path = _find(folder, name)
        if path is None:
            raise InputError(f"clip: got no {name}{ENDINGS[0]} in {folder}, expected it")
        blocks = f"{tower}.encoder.layers."
        table = KeyTable(tuple(_rules(name)), original_blocks="blocks.block_", blocks=blocks)
        entries |= table.from_original(read_weights(path))
    entries |= _constants(entries)
    text, vision = _text_config(entries), _vision_config(entries)
    width = tensor_shape(entries, "text_projection.weight", 2)[0]
    sources = str(folder), str(folder)
    configs = text, vision, width
    module = build("CLIPModel", configs, entries, sources=sources, sharding=sharding)
    return cast(CLIPModel, module)


def _find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    paths = (folder / f"{name}{ending}" for ending in ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def _constants(entries: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What no file has: biases of keys, without effect in any attention, and the logit scale."""
    found = {}
    for name, entry in entries.items():
        if name.endswith("k_proj.weight"):
            bias = name.replace("weight", "bias")
            found[bias] = replace(entry, name=bias, shape=entry.shape[:1], constant=0.0)
    first = next(iter(entries.values()))
    found["logit_scale"] = replace(first, name="logit_scale", shape=(), constant=LOGIT_SCALE)
    return found


def _tower(entries: Mapping[str, TensorInfo], tower: str) -> dict[str, Any]:
    """The fields that both towers have."""
    inner, width = tensor_shape(entries, f"{tower}.encoder.layers.0.mlp.fc1.weight", 2)
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "projection_dim": tensor_shape(entries, "text_projection.weight", 2)[0],
        "num_hidden_layers": count_modules(entries, f"{tower}.encoder.layers."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "hidden_act": "gelu",
    }


def _text_config(entries: Mapping[str, TensorInfo]) -> CLIPTextConfig:
    place = "text_model.embeddings"
    return CLIPTextConfig(
        vocab_size=tensor_shape(entries, f"{place}.token_embedding.weight", 2)[0],
        max_position_embeddings=tensor_shape(entries, f"{place}.position_embedding.weight", 2)[0],
        eos_token_id=len(vocabulary()) - 1,
        **_tower(entries, "text_model"),
    )


def _vision_config(entries: Mapping[str, TensorInfo]) -> NoisyCLIPVisionConfig:
    place = "vision_model.embeddings"
    patch = tensor_shape(entries, f"{place}.patch_embedding.weight", 4)[2]
    tokens = tensor_shape(entries, f"{place}.position_embedding.weight", 2)[0]
    return NoisyCLIPVisionConfig(
        num_timesteps=tensor_shape(entries, f"{place}.class_embedding", 2)[0],
        image_size=math.isqrt(tokens - 1) * patch,
        patch_size=patch,
        **_tower(entries, "vision_model"),
    )
