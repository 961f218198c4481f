"""Small random models of every family, and files with them in the original layout.

Names come from the tables of the published models in `original/`, so the stages, layers and depths
are those of the published models; only the widths are small.
"""

import functools
import json
import pathlib

import numpy as np
import tiny

from jaxdiff.checkpoints.loading import lazy_tensors
from jaxdiff.checkpoints.safetensors import LazyTensor, write_tensors
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig

TABLES = pathlib.Path(__file__).parent / "checkpoints" / "original"
DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
WIDTH = 64
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
FOUR = {
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "block_out_channels": (32,) * 4,
}
UNETS = {
    "sd1": ("unet_sd15", {**FOUR, "attention_head_dim": 8, "cross_attention_dim": WIDTH}),
    "sd2": (
        "unet_sd15",
        {**FOUR, "attention_head_dim": 1, "cross_attention_dim": 1024}
        | {"use_linear_projection": True},
    ),
    "sdxl": (
        "unet_sdxl_base",
        {
            "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
            "up_block_types": (CROSS_UP, CROSS_UP, UP),
            "block_out_channels": (32,) * 3,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": 1,
            "use_linear_projection": True,
            "cross_attention_dim": 2 * WIDTH,
            "projection_class_embeddings_input_dim": WIDTH + 6 * 256,
            **ADDED,
        },
    ),
    "refiner": (
        "unet_sdxl_refiner",
        {
            "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
            "up_block_types": (UP, CROSS_UP, CROSS_UP, UP),
            "block_out_channels": (32,) * 4,
            "transformer_layers_per_block": 4,
            "attention_head_dim": 1,
            "use_linear_projection": True,
            "cross_attention_dim": WIDTH,
            "projection_class_embeddings_input_dim": WIDTH + 5 * 256,
            **ADDED,
        },
    ),
}
# Component -> (prefix in the file, table of OpenCLIP's names or None, layers, activation).
TEXTS = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", None, 12, "quick_gelu")},
    "sd2": {"text_encoder": ("cond_stage_model.model.", "openclip_h_sd21", 23, "gelu")},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", None, 12, "quick_gelu"),
        "text_encoder_2": ("conditioner.embedders.1.model.", "openclip_bigg_sdxl", 32, "gelu"),
    },
    "refiner": {
        "text_encoder_2": ("conditioner.embedders.0.model.", "openclip_bigg_sdxl", 32, "gelu"),
    },
}


@functools.cache
def table(name: str) -> dict:
    """diffusers' or transformers' name -> original name with prefix, or [name, transform]."""
    return json.loads((TABLES / f"{name}.json").read_text())["map"]


@functools.cache
def components(family: str, *, words: int = 100, channels: int = 4) -> dict:
    """Random components of a family; `words` in the vocabulary, `channels` into the UNet."""
    _, fields = UNETS[family]
    unet = UNet2DConditionConfig(sample_size=8, in_channels=channels, layers_per_block=2, **fields)
    vae = AutoencoderKLConfig(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    found = {
        "unet": tiny.random_component(UNet2DConditionModel, unet, seed=1),
        "vae": tiny.random_component(AutoencoderKL, vae, seed=2),
    }
    for seed, (name, (_, names, layers, act)) in enumerate(TEXTS[family].items(), 3):
        config = CLIPTextConfig(
            vocab_size=words,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            projection_dim=512 if family == "sd2" else WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=1,
            hidden_act=act,
            bos_token_id=0,
            eos_token_id=2,
        )
        projects = names is not None and family != "sd2"
        found[name] = tiny.random_component(
            CLIPTextModel, config, seed=seed, with_projection=projects
        )
    return found


def original_tensors(family: str, parts: dict) -> dict[str, np.ndarray]:
    """The tensors of `parts` as a file of the original layout has them."""
    stored: dict[str, np.ndarray] = {}
    for key, tensor in lazy_tensors(parts["unet"].module).items():
        stored[table(UNETS[family][0])[key]] = tensor.fetch()
    for key, tensor in lazy_tensors(parts["vae"].module).items():
        values = tensor.fetch()
        convolved = ".attentions.0.to_" in key and values.ndim == 2
        stored[table("vae_sd")[key]] = values[:, :, None, None] if convolved else values
    for name, (prefix, names, layers, _) in TEXTS[family].items():
        tensors = {k: t.fetch() for k, t in lazy_tensors(parts[name].module).items()}
        if names is None:
            stored |= {prefix + key: values for key, values in tensors.items()}
        else:
            stored |= _open_clip(tensors, prefix, table(names))
            if family == "sd2":  # such files hold one layer more, and the projection
                last, more = f".resblocks.{layers - 1}.", f".resblocks.{layers}."
                extra = {k.replace(last, more): v for k, v in stored.items() if last in k}
                stored |= extra | {f"{prefix}text_projection": np.ones((WIDTH, 512), np.float32)}
    return stored


def _open_clip(tensors: dict, prefix: str, names: dict) -> dict[str, np.ndarray]:
    joint: dict[str, dict[int, np.ndarray]] = {}
    stored = {}
    for key, values in tensors.items():
        place, how = names[key]
        place = prefix + place.split(".model.", 1)[1]
        if how.startswith("rows"):
            joint.setdefault(place, {})[int(how.removeprefix("rows ").split(":")[0])] = values
        else:
            stored[place] = values.T if how == "transpose" else values
    for place, parts in joint.items():
        stored[place] = np.concatenate([parts[first] for first in sorted(parts)])
    return stored


def write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """Write arrays by name."""

    def fetch(values):
        return lambda: np.ascontiguousarray(values)

    write_tensors(
        path,
        {k: LazyTensor(dtype=v.dtype, shape=v.shape, fetch=fetch(v)) for k, v in tensors.items()},
    )
    return path
