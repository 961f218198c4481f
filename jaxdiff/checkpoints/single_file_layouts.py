"""The layouts of single files by family of Stable Diffusion, told apart by names of tensors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxdiff.checkpoints.clip_vocabulary import END
from jaxdiff.checkpoints.prediction_type import stored_prediction_type
from jaxdiff.checkpoints.safetensors import TensorInfo
from jaxdiff.core.errors import InputError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
ANOTHER_VAE = "a VAE of its own (--vae FILE, vae=...)"  # what a model without one can get
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


# Families that are not loaded, by how a tensor of theirs begins, with or without the UNet's prefix.
# The first one that fits counts.
OTHER_FAMILIES: Mapping[str, str] = {
    "embedder.model.visual.": "Stable unCLIP",
    "input_blocks.8.0.time_mixer.": "Stable Video Diffusion",
    "input_blocks.10.0.skip_connection.": "the Stable Diffusion x4 upscaler",
    "joint_blocks.0.": "Stable Diffusion 3",
    "double_stream_modulation_img.": "FLUX.2",
    "distilled_guidance_layer.": "Chroma",
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "double_blocks.0.img_attn.": "FLUX.1",
    "layers.0.adaLN_modulation.0.": "Z-Image",
    "cap_embedder.": "Lumina",
    "transformer_blocks.0.img_mod.": "Qwen-Image",
    "single_transformer_blocks.0.": "FLUX",
    "transformer_blocks.0.attn.add_q_proj.": "Stable Diffusion 3 or FLUX",
    "blocks.0.mlp.inverted_conv.": "Sana",
    "blocks.0.cross_attn.q_linear.": "PixArt",
    "double_layers.0.attn.w1q.": "AuraFlow",
    "mlp_t5.0.": "HunyuanDiT",
    "clf.1.": "Stable Cascade",
    "clip_txt_mapper.": "Stable Cascade",
    "t5_yproj.": "Mochi",
    "patchify_proj.": "LTX-Video",
    "head.modulation": "Wan",
    "double_stream_blocks.0.block.": "HiDream",
    "net.x_embedder.proj.1.": "Cosmos",
    "model.clip_img_proj.": "the prior of Kandinsky 2 or Karlo",
    "clip_img_proj.": "the prior of Kandinsky 2 or Karlo",
    "transformer_blocks.0.attn.": "Stable Diffusion 3 or FLUX",
    "blocks.0.cross_attn.q.": "Wan",
}
# Before the names of such networks in LoRAs, which may have underscores for dots.
_LORA_PREFIXES = re.compile(
    r"(lora_(unet|transformer)_|lycoris_|base_model\.model\.|transformer\.|diffusion_model\.)+"
)
# Names of a VAE alone, TAESD's own among them.
_VAE_NAMES = re.compile(
    r"(\w+\.)?decoder\.(conv_in|layers\.0)\.weight|(taesd_(en|de)coder\.)?\d+\.conv\.0\.weight"
)


@dataclass(frozen=True, kw_only=True)
class TextEncoderLayout:
    """A text encoder in a single file: where it is, how it is written, what it becomes."""

    prefix: str
    name: str  # of the component
    tokenizer: str
    pad: str  # token that fills short prompts
    hidden_act: str
    open_clip: bool = False  # written by OpenCLIP, not by transformers
    depth: int | None = None  # keep so many layers and no projection
    projection_dim: int | None = None  # what the published config says where no tensor does

    @property
    def class_name(self) -> str:
        """The class in transformers."""
        projects = self.open_clip and self.depth is None
        return "CLIPTextModelWithProjection" if projects else "CLIPTextModel"


@dataclass(frozen=True, kw_only=True)
class SingleFileLayout:
    """What the single files of a family share and their tensors do not say."""

    name: str
    pipeline: str  # class in diffusers, for text to image
    inpainting: str  # class for UNets of nine channels
    texts: tuple[TextEncoderLayout, ...]
    scheduler: Mapping[str, Any]
    sample_size: int  # latents along a side
    scaling_factor: float = 0.18215
    heads: int | None = None  # of the UNet's attention; None: as many of width 64 as fit
    options: Mapping[str, Any] = field(default_factory=dict)  # of model_index.json

    @property
    def classes(self) -> dict[str, str]:
        """The class of each component, by its prefix."""
        texts = {part.prefix: part.class_name for part in self.texts}
        return {UNET: "UNet2DConditionModel", VAE: "AutoencoderKL"} | texts


def _clip_l(prefix: str) -> TextEncoderLayout:
    return TextEncoderLayout(
        prefix=prefix, name="text_encoder", tokenizer="tokenizer", pad=END, hidden_act="quick_gelu"
    )


def _open_clip(prefix: str, number: str = "", *, depth: int | None = None) -> TextEncoderLayout:
    return TextEncoderLayout(
        prefix=prefix,
        name=f"text_encoder{number}",
        tokenizer=f"tokenizer{number}",
        pad="!",
        hidden_act="gelu",
        open_clip=True,
        depth=depth,
        projection_dim=512 if depth else None,
    )


SD1 = SingleFileLayout(
    name="Stable Diffusion 1",
    pipeline="StableDiffusionPipeline",
    inpainting="StableDiffusionInpaintPipeline",
    texts=(_clip_l("cond_stage_model.transformer."),),
    scheduler=_SCHEDULER | {"_class_name": "PNDMScheduler"},
    sample_size=64,
    heads=8,
)
# Files of 2.x do not say which they are; the 768-pixel models predict v, and are the later ones.
SD2 = SingleFileLayout(
    name="Stable Diffusion 2",
    pipeline="StableDiffusionPipeline",
    inpainting="StableDiffusionInpaintPipeline",
    texts=(_open_clip("cond_stage_model.model.", depth=23),),
    scheduler=_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    sample_size=96,
)
SD2_BASE = replace(
    SD2,
    name="Stable Diffusion 2 base",
    scheduler=_SCHEDULER | {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"},
    sample_size=64,
)
SD_TURBO = replace(
    SD2_BASE,
    name="SD-Turbo",
    texts=(_open_clip("conditioner.embedders.0.model.", depth=23),),
    scheduler=_EULER | {"prediction_type": "epsilon", "timestep_spacing": "trailing"},
)
SDXL = SingleFileLayout(
    name="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    inpainting="StableDiffusionXLInpaintPipeline",
    texts=(
        _clip_l("conditioner.embedders.0.transformer."),
        _open_clip("conditioner.embedders.1.model.", "_2"),
    ),
    scheduler=_EULER | {"prediction_type": "epsilon"},
    sample_size=128,
    scaling_factor=0.13025,
    options={"force_zeros_for_empty_prompt": True},
)
REFINER = SingleFileLayout(
    name="Stable Diffusion XL refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    inpainting="StableDiffusionXLInpaintPipeline",
    texts=(_open_clip("conditioner.embedders.0.model.", "_2"),),
    scheduler=_EULER | {"prediction_type": "epsilon"},
    sample_size=128,
    scaling_factor=0.13025,
    options={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
)


def other_family(names: Iterable[str]) -> str | None:
    """The family, which is not supported, of a model or LoRA with these names; None for others."""
    plain = {name.removeprefix(UNET) for name in names}
    plain |= {_flat(_LORA_PREFIXES.sub("", n)) for n in plain if _LORA_PREFIXES.match(n)}
    for beginning, family in OTHER_FAMILIES.items():
        if any(name.startswith((beginning, _flat(beginning))) for name in plain):
            return family
    return None


def _flat(name: str) -> str:
    return name.replace(".", "_")


def is_vae_alone(names: Iterable[str]) -> bool:
    """Whether these are names of a VAE, and none of a UNet."""
    names = list(names)
    return any(map(_VAE_NAMES.fullmatch, names)) and not any(n.startswith(UNET) for n in names)


def kind_of_model(names: Iterable[str]) -> str | None:
    """What a file is that should be something small, if it is a model; None for others."""
    names = set(names)
    if f"{UNET}input_blocks.0.0.weight" in names:
        return "a whole model"
    return "a VAE" if is_vae_alone(names) else None


def layout_of(
    entries: Mapping[str, TensorInfo], prediction_type: str | None = None
) -> SingleFileLayout:
    """The layout of a single file; InputError if it is none of them.

    `prediction_type` tells the two kinds of Stable Diffusion 2 apart, whose tensors are the same;
    without it, a file is of the kind that predicts v.
    """
    source = next(iter(entries.values())).path if entries else "checkpoint"
    if family := other_family(entries):
        raise InputError(
            f"{source}: got {family}, which is not supported, expected Stable Diffusion 1, 2 or XL"
        )
    if f"{UNET}input_blocks.0.0.weight" not in entries:
        if is_vae_alone(entries):
            raise InputError(
                f"{source}: got a VAE, expected a whole checkpoint, to which this VAE can be given "
                "(--vae FILE, vae=...)"
            )
        raise InputError(
            f"{source}: got {_some(entries)}, expected a Stable Diffusion checkpoint with "
            f"{UNET}input_blocks.0.0.weight"
        )
    added = f"{UNET}label_emb.0.0.weight" in entries
    for layout in (SDXL, REFINER) if added else (SD_TURBO, SD2, SD1):
        if all(any(name.startswith(part.prefix) for name in entries) for part in layout.texts):
            break
    else:
        raise InputError(f"{source}: got no text encoder, expected a complete checkpoint")
    return SD2_BASE if layout is SD2 and prediction_type == "epsilon" else layout


def layout_for(
    class_name: str, hidden_acts: Mapping[str, str], scheduler: Mapping[str, Any]
) -> SingleFileLayout:
    """The layout that a pipeline is written in, by its text encoders' names and activations.

    Raises InputError for what no single file can hold.
    """
    names = set(hidden_acts)
    predicts = stored_prediction_type(scheduler)
    if predicts == "flow_prediction":
        raise InputError(
            "scheduler_config.json: got the schedule of a flow, expected another: a single file of "
            "Stable Diffusion cannot say so"
        )
    if "XL" in class_name:
        return SDXL if names == {"text_encoder", "text_encoder_2"} else REFINER
    if names != {"text_encoder"}:
        raise InputError(f"text encoders: got {', '.join(sorted(names))}, expected text_encoder")
    if hidden_acts["text_encoder"] == "quick_gelu":
        return SD1
    if predicts == "epsilon":
        trailing = scheduler.get("timestep_spacing") == "trailing"
        return SD_TURBO if trailing else SD2_BASE
    return SD2


def _some(entries: Iterable[str]) -> str:
    names = sorted(entries)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "no tensors"
