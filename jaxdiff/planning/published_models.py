"""Models as shapes for planning: from config files, or by the name of a published repository."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flax import nnx

from jaxdiff.checkpoints.components import CONFIG, Component, abstract_component
from jaxdiff.checkpoints.folder_stages import FOLDER_STAGES
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.layout_glide import BASE_SCHEDULER, UPSAMPLER_SCHEDULER
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import (
    DEFAULTS,
    INDEX,
    PipelineComponents,
    abstract_pipeline,
    read_index,
    read_schedulers,
)
from jaxdiff.checkpoints.tokenizers import TokenizerFiles
from jaxdiff.core.aliases import rename_settings
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Dtype
from jaxdiff.experiments.experiment import FILES, ModelSource
from jaxdiff.families.base import Family
from jaxdiff.families.detection import detect_family
from jaxdiff.models.presets import preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """What the files of a published pipeline say, without a file."""

    class_name: str  # of the pipeline, as model_index.json names it
    components: Mapping[str, tuple[str, str]]  # the kind and the name of the preset of each
    scheduler: Mapping[str, Any]  # scheduler_config.json
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of model_index.json
    # of the noise of images that a network enlarges
    noising_schedulers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # of requests, where the files leave them open: guidance_scale, steps, height, width, ...
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def pipeline(self, **options: Any) -> PipelineComponents:
        """The pipeline with shapes for weights; `options` are dtypes and the like."""
        components = {
            name: Component(module=preset(*chosen).abstract(**options))
            for name, chosen in self.components.items()
        }
        return PipelineComponents(
            class_name=self.class_name,
            components=components,
            scheduler=self.scheduler,
            options=self.options,
            noising_schedulers=self.noising_schedulers,
            defaults=self.defaults,
        )


_SD_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
_FLOW_SCHEDULE: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
_FLUX_SCHEDULE = {
    **_FLOW_SCHEDULE,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}

_UNCLIP_SCHEDULE: dict[str, Any] = {
    "_class_name": "UnCLIPScheduler",
    "num_train_timesteps": 1000,
    "variance_type": "fixed_small_log",
    "clip_sample": True,
}


def _sd3(transformer: str) -> PublishedModel:
    return PublishedModel(
        class_name="StableDiffusion3Pipeline",
        components={
            "transformer": ("transformer", transformer),
            "vae": ("vae", "sd3"),
            "text_encoder": ("text", "clip-l-projection"),
            "text_encoder_2": ("text", "openclip-bigg"),
            "text_encoder_3": ("text", "t5-xxl"),
        },
        scheduler=_FLOW_SCHEDULE,
    )


def _flux(transformer: str, scheduler: Mapping[str, Any]) -> PublishedModel:
    return PublishedModel(
        class_name="FluxPipeline",
        components={
            "transformer": ("transformer", transformer),
            "vae": ("vae", "flux"),
            "text_encoder": ("text", "clip-l"),
            "text_encoder_2": ("text", "t5-xxl"),
        },
        scheduler=scheduler,
    )


def _dit(transformer: str) -> PublishedModel:
    return PublishedModel(
        class_name="DiTPipeline",
        components={"transformer": ("transformer", transformer), "vae": ("vae", "sd")},
        scheduler={
            "_class_name": "DDIMScheduler",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
            "clip_sample": False,
        },
    )


def _glide(unet: str, scheduler: Mapping[str, Any]) -> PublishedModel:
    return PublishedModel(
        class_name="GlidePipeline",
        components={"unet": ("unet", unet), "text_encoder": ("text", "glide")},
        scheduler=scheduler,
    )


_KANDINSKY_SCHEDULE: dict[str, Any] = {
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
}


def _prior(class_name: str, prior: str, text_encoder: str) -> PublishedModel:
    return PublishedModel(
        class_name=class_name,
        components={"prior": ("prior", prior), "text_encoder": ("text", text_encoder)},
        scheduler=_UNCLIP_SCHEDULE | {"prediction_type": "sample", "clip_sample_range": 5.0},
    )


def _kandinsky_21(class_name: str, unet: str) -> PublishedModel:
    return PublishedModel(
        class_name=class_name,
        components={
            "unet": ("unet", unet),
            "movq": ("vae", "kandinsky-movq"),
            "text_encoder": ("text", "kandinsky21-mclip"),
        },
        scheduler={
            "_class_name": "DDIMScheduler",
            **_KANDINSKY_SCHEDULE,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    )


def _kandinsky_22(class_name: str, unet: str) -> PublishedModel:
    return PublishedModel(
        class_name=class_name,
        components={"unet": ("unet", unet), "movq": ("vae", "kandinsky-movq")},
        scheduler={
            "_class_name": "DDPMScheduler",
            **_KANDINSKY_SCHEDULE,
            "variance_type": "learned_range",
        },
    )


PUBLISHED_MODELS: dict[str, PublishedModel] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": PublishedModel(
        class_name="StableDiffusionPipeline",
        components={
            "unet": ("unet", "sd15"),
            "vae": ("vae", "sd"),
            "text_encoder": ("text", "clip-l"),
        },
        scheduler={"_class_name": "PNDMScheduler", **_SD_SCHEDULE},
    ),
    "stabilityai/stable-diffusion-2-1": PublishedModel(
        class_name="StableDiffusionPipeline",
        components={
            "unet": ("unet", "sd21"),
            "vae": ("vae", "sd"),
            "text_encoder": ("text", "openclip-h"),
        },
        scheduler={
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            **_SD_SCHEDULE,
        },
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": PublishedModel(
        class_name="StableDiffusionXLPipeline",
        components={
            "unet": ("unet", "sdxl-base"),
            "vae": ("vae", "sdxl"),
            "text_encoder": ("text", "clip-l"),
            "text_encoder_2": ("text", "openclip-bigg"),
        },
        scheduler={
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
            **_SD_SCHEDULE,
        },
        options={"force_zeros_for_empty_prompt": True},
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3("sd3-medium"),
    "stabilityai/stable-diffusion-3.5-medium": _sd3("sd35-medium"),
    "stabilityai/stable-diffusion-3.5-large": _sd3("sd35-large"),
    "black-forest-labs/FLUX.1-schnell": _flux("flux-schnell", _FLOW_SCHEDULE | {"shift": 1.0}),
    "black-forest-labs/FLUX.1-dev": _flux("flux-dev", _FLUX_SCHEDULE),
    "lodestones/Chroma1-HD": PublishedModel(
        class_name="ChromaPipeline",
        components={
            "transformer": ("transformer", "chroma"),
            "vae": ("vae", "flux"),
            "text_encoder": ("text", "t5-xxl"),
        },
        scheduler=_FLOW_SCHEDULE,
    ),
    "DeepFloyd/IF-I-XL-v1.0": PublishedModel(
        class_name="IFPipeline",
        components={"unet": ("unet", "if-i-xl"), "text_encoder": ("text", "t5-xxl")},
        scheduler={
            "_class_name": "DDPMScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "num_train_timesteps": 1000,
            "variance_type": "learned_range",
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.95,
            "sample_max_value": 1.5,
        },
    ),
    "stabilityai/stable-diffusion-x4-upscaler": PublishedModel(
        class_name="StableDiffusionUpscalePipeline",
        components={
            "unet": ("unet", "sd-x4-upscaler"),
            "vae": ("vae", "sd-x4-upscaler"),
            "text_encoder": ("text", "openclip-h"),
        },
        scheduler={
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            **_SD_SCHEDULE,
            "beta_start": 0.0001,
            "beta_end": 0.02,
        },
        noising_schedulers={
            "low_res_scheduler": {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear"}
        },
    ),
    # Files, not repositories.
    "openai/glide-text2im/base": _glide("glide-base", BASE_SCHEDULER),
    "openai/glide-text2im/upsample": _glide("glide-upsample", UPSAMPLER_SCHEDULER),
    "kandinsky-community/kandinsky-2-1-prior": _prior(
        "KandinskyPriorPipeline", "kandinsky21", "clip-l-projection"
    ),
    "kandinsky-community/kandinsky-2-1": _kandinsky_21("KandinskyPipeline", "kandinsky21"),
    "kandinsky-community/kandinsky-2-1-inpaint": _kandinsky_21(
        "KandinskyInpaintPipeline", "kandinsky21-inpaint"
    ),
    "kandinsky-community/kandinsky-2-2-prior": _prior(
        "KandinskyV22PriorPipeline", "kandinsky22", "openclip-bigg"
    ),
    "kandinsky-community/kandinsky-2-2-decoder": _kandinsky_22(
        "KandinskyV22Pipeline", "kandinsky22"
    ),
    "kandinsky-community/kandinsky-2-2-decoder-inpaint": _kandinsky_22(
        "KandinskyV22InpaintPipeline", "kandinsky22-inpaint"
    ),
    "kandinsky-community/kandinsky-2-2-controlnet-depth": _kandinsky_22(
        "KandinskyV22ControlnetPipeline", "kandinsky22-controlnet"
    ),
    "stabilityai/stable-diffusion-2-1-unclip": PublishedModel(
        class_name="StableUnCLIPImg2ImgPipeline",
        components={
            "unet": ("unet", "stable-unclip-h"),
            "vae": ("vae", "sd"),
            "text_encoder": ("text", "openclip-h"),
            "image_encoder": ("image", "openclip-h"),
            "image_normalizer": ("unclip", "stable-unclip-h-normalizer"),
        },
        scheduler={
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            **_SD_SCHEDULE,
        },
        noising_schedulers={
            "image_noising_scheduler": {
                "_class_name": "DDPMScheduler",
                "beta_schedule": "squaredcos_cap_v2",
            }
        },
    ),
    # The models in one repository.
    "kakaobrain/karlo-v1-alpha/prior": _prior(
        "UnCLIPPriorPipeline", "kandinsky21", "clip-l-projection"
    ),
    "kakaobrain/karlo-v1-alpha/decoder": PublishedModel(
        class_name="UnCLIPDecoderPipeline",
        components={
            "decoder": ("unet", "karlo-decoder"),
            "text_proj": ("unclip", "karlo-text-proj"),
            "text_encoder": ("text", "clip-l-projection"),
        },
        scheduler=_UNCLIP_SCHEDULE | {"variance_type": "learned_range"},
    ),
    "kakaobrain/karlo-v1-alpha/super_res": PublishedModel(
        class_name="UnCLIPSuperResolutionPipeline",
        components=dict.fromkeys(
            ("super_res_first", "super_res_last"), ("unet", "karlo-super-resolution")
        ),
        scheduler=_UNCLIP_SCHEDULE,
    ),
    "facebook/DiT-XL-2-256": _dit("dit-xl-2-256"),
    "facebook/DiT-XL-2-512": _dit("dit-xl-2-512"),
}


def published_component(path: str | pathlib.Path, **options: Any) -> nnx.Module:
    """The module in the folder `path`, or in that of a published repository, as shapes."""
    folder = pathlib.Path(path)
    if (folder / CONFIG).is_file():
        return abstract_component(folder, **options)
    repository, _, name = str(path).rpartition("/")
    known = PUBLISHED_MODELS.get(repository)
    if known is None or name not in known.components:
        raise InputError(
            f"plan: got {path} without a config.json, expected one, or a part of "
            f"{', '.join(PUBLISHED_MODELS)}"
        )
    return preset(*known.components[name]).abstract(**options)


def published_model(
    source: str,
    dtype: Dtype,
    *,
    base: str | None = None,
    vae: str | None = None,
    text_encoders: Sequence[str] = (),
    prediction_type: str | None = None,
) -> tuple[Family, PipelineComponents]:
    """The family and the components of a pipeline folder or file, or of a published repository.

    Of a folder with several models FOLDER/NAME is one. Weights are shapes: of files, headers and
    configs alone are read. The others, which are files or folders too, are those of `jaxdiff.load`.
    InputError for what is not there.
    """
    options, others = {"dtype": dtype, "param_dtype": dtype}, {"base": base, "vae": vae}
    given = {name: place for name, place in others.items() if place is not None}
    plain = not given and not text_encoders and prediction_type is None
    if source in PUBLISHED_MODELS and plain:
        parts = PUBLISHED_MODELS[source].pipeline(**options)
    elif plain and (stage := _stage(pathlib.Path(source))):
        parts = _folder(pathlib.Path(source).parent, **options).stages()[stage]
    else:
        _check_there(source, given, by_name=plain)
        if pathlib.Path(source).is_dir() and plain:  # tokenizers may lack
            parts = _folder(pathlib.Path(source), **options)
        else:
            parts = read_model(
                *(source, dtype),
                only=(),
                base=base,
                vae=vae,
                text_encoders=text_encoders,
                prediction_type=prediction_type,
            )
    if stages := FOLDER_STAGES.get(parts.class_name):
        names = " or ".join(f"{source}/{stage.name}" for stage in stages)
        raise InputError(f"plan: model: got {source}, which is several models, expected {names}")
    modules = {name: component.module for name, component in parts.components.items()}
    return detect_family(parts.class_name, modules, parts.family_options, source=source), parts


def _stage(path: pathlib.Path) -> str | None:
    """The name of the model that `path` is in the folder with several that it is in, if it is."""
    if not (path.parent / INDEX).is_file():
        return None
    stages = FOLDER_STAGES.get(read_index(path.parent)["_class_name"], ())
    return next((stage.name for stage in stages if stage.name == path.name), None)


def _check_there(
    source: str, others: Mapping[str, str] = MappingProxyType({}), *, by_name: bool = True
) -> None:
    """InputError for a model, or `others` by option, that would have to be downloaded.

    `by_name` says that a published model would do.
    """
    for name, place in {"model": source, **others}.items():
        if not pathlib.Path(place).exists():
            known = f", or {', '.join(PUBLISHED_MODELS)}" if name == "model" and by_name else ""
            raise InputError(
                f"plan: {name}: got {place}, expected a folder or file that is there{known}"
            )


def _folder(folder: pathlib.Path, **options: Any) -> PipelineComponents:
    class_name, modules, plain = abstract_pipeline(folder, **options)
    defaults = folder / DEFAULTS
    stored = read_object(defaults) if defaults.exists() else {}
    scheduler, of_stages = read_schedulers(folder)
    return PipelineComponents(
        class_name=class_name,
        components={
            name: Component(module=module, config=read_object(folder / name / CONFIG))
            for name, module in modules.items()
        },
        scheduler=scheduler,
        stage_schedulers=of_stages,
        options=plain,
        defaults=rename_settings(stored, source=str(defaults)),
    )


def _pipeline(source: str) -> PipelineComponents:
    """The pipeline in a folder or file, or of a published repository, of which nothing is read."""
    if source in PUBLISHED_MODELS:
        return PUBLISHED_MODELS[source].pipeline()
    _check_there(source)
    return FILES.pipeline(source)


def _tokenizers(folder: pathlib.Path) -> dict[str, TokenizerFiles]:
    """None: plans do not read captions."""
    del folder
    return {}


PUBLISHED = ModelSource(published_component, _pipeline, _tokenizers)
