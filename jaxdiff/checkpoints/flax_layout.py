"""The legacy Flax layout, as it is written: the inverse of `flax_msgpack`.

Folders are those of diffusers' FlaxStableDiffusionPipeline: classes have the prefix Flax, and each
component is one file in which `flax.serialization` keeps a map nested by name. Here it is written
leaf by leaf, so that the host holds one weight at a time. Our weights have Flax's axes already.
"""

import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from flax import nnx, serialization, traverse_util

from jaxdiff.checkpoints.key_aliases import NEW_ATTENTION
from jaxdiff.checkpoints.loading import on_host
from jaxdiff.core.types import Dtype
from jaxdiff.core.validate import one_of
from jaxdiff.models.build import param_dict

PREFIX = "Flax"
STEMS = {"diffusers": "diffusion_flax_model", "transformers": "flax_model"}
LAST = "0.39.0"  # the last diffusers release line that reads the layout
# Classes that had a counterpart in Flax.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
)
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)
# Fields that Flax classes did not have, with what they did instead.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "UNet2DConditionModel": {
        "act_fn": ("silu", "swish"),
        "norm_num_groups": (32,),
        "norm_eps": (1e-5,),
        "center_input_sample": (False,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "mid_block_scale_factor": (1.0,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "reverse_transformer_layers_per_block": (None,),
        "downsample_padding": (1,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
    },
    "AutoencoderKL": {
        "down_block_types": tuple(("DownEncoderBlock2D",) * n for n in range(1, 9)),
        "up_block_types": tuple(("UpDecoderBlock2D",) * n for n in range(1, 9)),
        "act_fn": ("silu", "swish"),
        "shift_factor": (None,),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    },
}
# Flax's loader asked for these by their arguments unless a library was named, if no class.
ABSENT = {"feature_extractor": ["transformers", None], "safety_checker": ["stable_diffusion", None]}
# What Flax pipelines know nothing of.
UNKNOWN = ("image_encoder", "requires_safety_checker")
_OLD_ATTENTION = {new.replace(".", "_"): old for old, new in NEW_ATTENTION.items()}
_INDEX = re.compile(r"\.(\d+)(?=\.)")


def flax_names(path: str, class_name: str) -> tuple[str, ...]:
    """Where Flax keeps the weight at a module `path` of a diffusers or transformers class.

    diffusers numbered modules with an underscore ("resnets_0"), transformers as one more level.
    """
    if class_name.startswith("CLIP"):
        return tuple(path.split("."))
    names = _INDEX.sub(r"_\1", path).split(".")
    if class_name == "AutoencoderKL":
        names[-2] = _OLD_ATTENTION.get(names[-2], names[-2])
    return tuple(names)


def write_flax(
    path: pathlib.Path, module: nnx.Module, *, class_name: str, dtype: Dtype | None = None
) -> None:
    """Write the weights of `module` to a .msgpack file; `dtype` converts them, None keeps it.

    A warning says where the class of Flax had not the config's structure.
    """
    for name, known in FIXED.get(class_name, {}).items():
        value = getattr(module.config, name)  # pyright: ignore[reportAttributeAccessIssue]
        if value not in known:
            message = (
                f"{class_name}: {name} is {value}, and the class of Flax knows {known[0]} only"
            )
            warnings.warn(message, stacklevel=2)
    named = {flax_names(key, class_name): array for key, array in param_dict(module).items()}
    with path.open("wb") as file:
        _write(file, traverse_util.unflatten_dict(named), dtype)


def _write(file: BinaryIO, tree: Mapping[str, Any], dtype: Dtype | None) -> None:
    """A map in msgpack: its length in one byte, or in two behind 0xde; then names and values."""
    count = len(tree)
    file.write(bytes([0x80 | count]) if count < 16 else b"\xde" + count.to_bytes(2, "big"))
    for name, node in tree.items():
        file.write(serialization.msgpack_serialize(name))
        if isinstance(node, Mapping):
            _write(file, node, dtype)
        else:
            kind = np.dtype(node.dtype if dtype is None else dtype)
            file.write(serialization.msgpack_serialize(on_host(node, kind)))


def flax_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """A model_index.json with the classes of Flax; InputError for one that had no counterpart."""
    one_of("class for Flax", index["_class_name"], PIPELINES)
    one_of("scheduler for Flax", index["scheduler"][1], SCHEDULERS)
    renamed = {name: value for name, value in index.items() if name not in UNKNOWN}
    for name, value in renamed.items():
        if name in ABSENT:
            renamed[name] = ABSENT[name]
        elif isinstance(value, list) and value[1] and "Tokenizer" not in value[1]:
            renamed[name] = [value[0], PREFIX + value[1]]
    named = {"_class_name": PREFIX + index["_class_name"], "_diffusers_version": LAST}
    return renamed | named
