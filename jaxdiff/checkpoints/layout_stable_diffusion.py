"""Single files of Stable Diffusion 1, 2 and XL, as CompVis and Stability AI published them."""

import functools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxdiff.checkpoints import infer_config, ldm_reader, ldm_writer, leftovers
from jaxdiff.checkpoints.clip_vocabulary import END
from jaxdiff.checkpoints.layout_parts import UNET_PART, clip
from jaxdiff.checkpoints.prediction_type import stored_prediction_type
from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.checkpoints.single_file_layouts import (
    UNET,
    VAE,
    Entries,
    FileComponent,
    SingleFileLayout,
)
from jaxdiff.core.errors import InputError

PIPELINES = (
    *(
        f"StableDiffusion{version}{task}Pipeline"
        for version in ("", "XL")
        for task in ("", "Img2Img", "Inpaint")
    ),
    "LatentConsistencyModelPipeline",
)
_FIRST = f"{UNET}input_blocks.0.0.weight"
_WIDTH = "cross_attention_dim"  # of the UNet: that of all states that it attends to
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_SCHEDULER = _BETAS | {
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
_EULER = _SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}


VAE_PART = FileComponent(
    name="vae",
    class_name="AutoencoderKL",
    prefix=VAE,
    config=infer_config.vae_fields,
    read=ldm_reader.vae_from_ldm,
    write=ldm_writer.vae_to_ldm,
)


def _clip_l(prefix: str) -> FileComponent:
    return FileComponent(
        name="text_encoder",
        class_name="CLIPTextModel",
        prefix=prefix,
        config=infer_config.clip_text_fields,
        read=functools.partial(clip, class_name="CLIPTextModel"),
        tokenizer="tokenizer",
        pad=END,
        width=_WIDTH,
    )


def _first_layers(entries: Entries, *, class_name: str, depth: int | None) -> dict[str, TensorInfo]:
    """CLIP's tensors without those of the layers from `depth` on (None: with all)."""
    layers = {name: re.search(r"\.layers\.(\d+)\.", name) for name in entries}
    known = {
        n: e
        for n, e in entries.items()
        if (m := layers[n]) is None or int(m[1]) < (depth or math.inf)
    }
    return clip(known, class_name=class_name)


def _open_clip(prefix: str, number: str = "", *, depth: int | None = None) -> FileComponent:
    """OpenCLIP's text encoder; `depth` keeps so many layers and no projection."""
    class_name = "CLIPTextModelWithProjection" if depth is None else "CLIPTextModel"
    return FileComponent(
        name=f"text_encoder{number}",
        class_name=class_name,
        prefix=prefix,
        config=infer_config.clip_text_fields,
        read=functools.partial(ldm_reader.clip_from_open_clip, depth=depth),
        write=ldm_writer.clip_to_open_clip,
        tokenizer=f"tokenizer{number}",
        pad="!",
        unused=leftovers.UNUSED,
        width=_WIDTH,
        alone=functools.partial(_first_layers, class_name=class_name, depth=depth),
    )


def _fields(
    *, side: int, scaling_factor: float = 0.18215, heads: int | None = None, **texts: Any
) -> dict[str, dict[str, Any]]:
    """What shapes do not tell; `side` in latents, `heads` None: of width 64."""
    unet = {"sample_size": side} | ({} if heads is None else {"attention_head_dim": heads})
    vae = {"sample_size": 8 * side, "scaling_factor": scaling_factor}
    return {"unet": unet, "vae": vae, **texts}


_QUICK, _GELU = {"hidden_act": "quick_gelu"}, {"hidden_act": "gelu"}
# The published config of Stable Diffusion 2 has a width of a projection, which is not there.
_OF_SD2 = _GELU | {"projection_dim": 512}
SD1 = SingleFileLayout(
    name="Stable Diffusion 1",
    pipeline="StableDiffusionPipeline",
    components=(UNET_PART, VAE_PART, _clip_l("cond_stage_model.transformer.")),
    scheduler=_SCHEDULER | {"_class_name": "PNDMScheduler"},
    fields=_fields(side=64, heads=8, text_encoder=_QUICK),
)
# Files of 2.x do not say which they are; the 768-pixel models predict v, and are the later ones.
SD2 = SingleFileLayout(
    name="Stable Diffusion 2",
    pipeline="StableDiffusionPipeline",
    components=(UNET_PART, VAE_PART, _open_clip("cond_stage_model.model.", depth=23)),
    scheduler=_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    fields=_fields(side=96, text_encoder=_OF_SD2),
)
SD2_BASE = replace(
    SD2,
    name="Stable Diffusion 2 base",
    scheduler=_SCHEDULER | {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"},
    fields=_fields(side=64, text_encoder=_OF_SD2),
)
SD_TURBO = replace(
    SD2_BASE,
    name="SD-Turbo",
    components=(UNET_PART, VAE_PART, _open_clip("conditioner.embedders.0.model.", depth=23)),
    scheduler=_EULER | {"prediction_type": "epsilon", "timestep_spacing": "trailing"},
)
SDXL = SingleFileLayout(
    name="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    components=(
        UNET_PART,
        VAE_PART,
        _clip_l("conditioner.embedders.0.transformer."),
        _open_clip("conditioner.embedders.1.model.", "_2"),
    ),
    scheduler=_EULER | {"prediction_type": "epsilon"},
    fields=_fields(side=128, scaling_factor=0.13025, text_encoder=_QUICK, text_encoder_2=_GELU),
    options={"force_zeros_for_empty_prompt": True},
)
REFINER = SingleFileLayout(
    name="Stable Diffusion XL refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    components=(UNET_PART, VAE_PART, _open_clip("conditioner.embedders.0.model.", "_2")),
    scheduler=_EULER | {"prediction_type": "epsilon"},
    fields=_fields(side=128, scaling_factor=0.13025, text_encoder_2=_GELU),
    options={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
)
_CONTEXT = "attn2.to_k.weight"  # whose columns tell the families apart where no text encoder is


def detect(entries: Entries, prediction_type: str | None = None) -> SingleFileLayout | None:
    """The layout of a file of Stable Diffusion; None for others.

    `prediction_type` tells the two kinds of Stable Diffusion 2 apart, whose tensors are the same;
    without it, a file is of the kind that predicts v.
    """
    if _FIRST not in entries:
        return None
    added = f"{UNET}label_emb.0.0.weight" in entries
    layouts = (SDXL, REFINER) if added else (SD_TURBO, SD2, SD1)
    layout = next((each for each in layouts if _has_texts(entries, each)), None)
    if layout is None:
        layout = _by_width(entries, added=added)
    if layout is SD2 and prediction_type == "epsilon":
        layout = SD2_BASE
    if entries[_FIRST].shape[1:2] == (9,):
        inpainting = (
            "StableDiffusionXLInpaintPipeline" if added else "StableDiffusionInpaintPipeline"
        )
        return replace(layout, pipeline=inpainting)
    return layout


def _has_texts(entries: Entries, layout: SingleFileLayout) -> bool:
    texts = layout.components[2:]
    return all(any(name.startswith(part.prefix) for name in entries) for part in texts)


def _by_width(entries: Entries, *, added: bool) -> SingleFileLayout:
    """The layout of a file without text encoders, by what its UNet attends to."""
    widths = {e.shape[1:] for name, e in entries.items() if name.endswith(_CONTEXT)}
    if added:
        return REFINER if widths == {(1280,)} else SDXL
    return SD2 if widths == {(1024,)} else SD1


def _refiner(names: Collection[str]) -> SingleFileLayout:
    """The refiner's layout, whose text encoder may have another name in its folder."""
    unet, vae, text = REFINER.components
    own = text if text.name in names else replace(text, name="text_encoder")
    return replace(REFINER, components=(unet, vae, own))


def layout_for(
    class_name: str, configs: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> SingleFileLayout:
    """The layout that a pipeline is written in, by its text encoders' names and activations.

    Raises InputError for what no single file can hold.
    """
    names = {name for name in configs if name.startswith("text_encoder")}
    predicts = stored_prediction_type(scheduler)
    if predicts == "flow_prediction":
        raise InputError(
            "scheduler_config.json: got the schedule of a flow, expected another: a single file of "
            "Stable Diffusion cannot say so"
        )
    if "XL" in class_name:
        return SDXL if names == {"text_encoder", "text_encoder_2"} else _refiner(names)
    if names != {"text_encoder"}:
        raise InputError(f"text encoders: got {', '.join(sorted(names))}, expected text_encoder")
    if configs["text_encoder"].hidden_act == "quick_gelu":
        return SD1
    if predicts == "epsilon":
        trailing = scheduler.get("timestep_spacing") == "trailing"
        return SD_TURBO if trailing else SD2_BASE
    return SD2
