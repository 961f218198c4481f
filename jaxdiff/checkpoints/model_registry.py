"""The diffusers and transformers classes of component folders, and their modules here."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flax import nnx

from jaxdiff.checkpoints.configs import from_diffusers, from_transformers
from jaxdiff.core.configs import to_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from jaxdiff.models.build import abstract
from jaxdiff.models.chroma.config import ChromaTransformer2DConfig
from jaxdiff.models.chroma.module import ChromaTransformer2DModel
from jaxdiff.models.classifier import LatentClassifier, LatentClassifierConfig
from jaxdiff.models.clip import CLIPModel, CLIPTextModel, CLIPVisionModel
from jaxdiff.models.clip_config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    NoisyCLIPVisionConfig,
)
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.dit.module import DiTTransformer2DModel
from jaxdiff.models.flux.config import FluxTransformer2DConfig
from jaxdiff.models.flux.module import FluxTransformer2DModel
from jaxdiff.models.glide_text.config import GlideTextConfig
from jaxdiff.models.glide_text.module import GlideTextModel
from jaxdiff.models.ldm_bert.config import LDMBertConfig
from jaxdiff.models.ldm_bert.module import LDMBertModel
from jaxdiff.models.multilingual_clip.config import MultilingualCLIPConfig
from jaxdiff.models.multilingual_clip.module import MultilingualCLIP
from jaxdiff.models.pixart.config import PixArtTransformer2DConfig
from jaxdiff.models.pixart.module import PixArtTransformer2DModel
from jaxdiff.models.prior.config import PriorTransformerConfig
from jaxdiff.models.prior.module import PriorTransformer
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.models.sd3.module import SD3Transformer2DModel
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.models.unclip import (
    StableUnCLIPImageNormalizer,
    StableUnCLIPImageNormalizerConfig,
    UnCLIPTextProjConfig,
    UnCLIPTextProjModel,
)
from jaxdiff.models.unet.class_conditional import (
    ClassConditionalUNet2DConfig,
    ClassConditionalUNet2DModel,
)
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.unet.unet_2d import UNet2DModel
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.models.vq_model import VQModel, VQModelConfig

Configs = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class ModelClass:
    """One class of diffusers or transformers."""

    name: str
    module: type[nnx.Module]
    configs: Callable[..., Configs]  # (raw, source=...): the module's positional arguments
    config: type | None = None  # the class of its config; None: it has several
    options: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None  # transformers' name of the architecture
    module_name: str | None = None  # in model_index.json; None: the library

    @property
    def library(self) -> str:
        """The package that the class is from."""
        return "diffusers" if self.model_type is None else "transformers"

    @property
    def stem(self) -> str:
        """The weights' file name without its extension."""
        return "diffusion_pytorch_model" if self.library == "diffusers" else "model"

    @property
    def identity(self) -> dict[str, Any]:
        """The entries of config.json that say which class it is."""
        if self.library == "diffusers":
            return {"_class_name": self.name}
        return {"architectures": [self.name], "model_type": self.model_type}


def single_config(
    read: Callable[..., Any], cls: type, raw: Mapping[str, Any], *, source: str
) -> Configs:
    """The config of class `cls` as the one argument of a module, read from its config.json."""
    return (read(cls, raw, source=source),)


@dataclass(frozen=True, kw_only=True)
class _CLIPProjectionConfig:
    """CLIPModel's own fields, beside those of its towers."""

    projection_dim: int = 512


def _clip(raw: Mapping[str, Any], *, source: str) -> Configs:
    """The two towers of CLIPModel; its own entries are the projection and bookkeeping."""
    towers: dict[str, Mapping[str, Any]] = {}
    for name in ("text_config", "vision_config"):
        if not isinstance(raw.get(name), Mapping):
            raise InputError(f"{source}: {name}: got {raw.get(name)!r:.80}, expected an object")
        # Old files repeat some of a tower's entries under a second name; those count.
        towers[name] = raw[name] | (raw.get(f"{name}_dict") or {})
    own = {k: v for k, v in raw.items() if k.removesuffix("_dict") not in towers}
    contrast = from_transformers(_CLIPProjectionConfig, own, source=source)
    text, vision = towers.values()
    seen = NoisyCLIPVisionConfig if "num_timesteps" in vision else CLIPVisionConfig
    return (
        from_transformers(CLIPTextConfig, text, source=f"{source}: text_config"),
        from_transformers(seen, vision, source=f"{source}: vision_config"),
        contrast.projection_dim,
    )


def _diffusers(name: str, module: type[nnx.Module], config: type) -> ModelClass:
    configs = partial(single_config, from_diffusers, config)
    return ModelClass(name=name, module=module, configs=configs, config=config)


def _transformers(
    name: str, module: type[nnx.Module], config: type, model_type: str, **options: Any
) -> ModelClass:
    return ModelClass(
        name=name,
        module=module,
        configs=partial(single_config, from_transformers, config),
        config=config,
        options=options,
        model_type=model_type,
    )


_TEXT = CLIPTextModel, CLIPTextConfig, "clip_text_model"
_VISION = CLIPVisionModel, CLIPVisionConfig, "clip_vision_model"
_CLASSES = (
    _diffusers("UNet2DConditionModel", UNet2DConditionModel, UNet2DConditionConfig),
    _diffusers("UNet2DModel", UNet2DModel, UNet2DConfig),
    _diffusers("FluxTransformer2DModel", FluxTransformer2DModel, FluxTransformer2DConfig),
    _diffusers("ChromaTransformer2DModel", ChromaTransformer2DModel, ChromaTransformer2DConfig),
    _diffusers("SD3Transformer2DModel", SD3Transformer2DModel, SD3Transformer2DConfig),
    _diffusers("DiTTransformer2DModel", DiTTransformer2DModel, DiTTransformer2DConfig),
    _diffusers("PixArtTransformer2DModel", PixArtTransformer2DModel, PixArtTransformer2DConfig),
    _diffusers("PriorTransformer", PriorTransformer, PriorTransformerConfig),
    _diffusers("AutoencoderKL", AutoencoderKL, AutoencoderKLConfig),
    _diffusers("VQModel", VQModel, VQModelConfig),
    _diffusers("AutoencoderTiny", AutoencoderTiny, AutoencoderTinyConfig),
    # Classes of diffusers' pipelines.
    dataclasses.replace(
        _diffusers("UnCLIPTextProjModel", UnCLIPTextProjModel, UnCLIPTextProjConfig),
        module_name="unclip",
    ),
    dataclasses.replace(
        _diffusers(
            "StableUnCLIPImageNormalizer",
            StableUnCLIPImageNormalizer,
            StableUnCLIPImageNormalizerConfig,
        ),
        module_name="stable_diffusion",
    ),
    # diffusers has no such classes.
    _diffusers(
        "ClassConditionalUNet2DModel", ClassConditionalUNet2DModel, ClassConditionalUNet2DConfig
    ),
    # diffusers reads no folder that model_index.json does not name.
    _diffusers("LatentClassifier", LatentClassifier, LatentClassifierConfig),
    _transformers("CLIPTextModel", *_TEXT),
    _transformers("CLIPTextModelWithProjection", *_TEXT, with_projection=True),
    _transformers("CLIPVisionModel", *_VISION),
    _transformers("CLIPVisionModelWithProjection", *_VISION, with_projection=True),
    # Classes of diffusers' pipelines, in transformers' way.
    dataclasses.replace(
        _transformers("LDMBertModel", LDMBertModel, LDMBertConfig, "ldmbert"),
        module_name="latent_diffusion",
    ),
    dataclasses.replace(
        _transformers("MultilingualCLIP", MultilingualCLIP, MultilingualCLIPConfig, "M-CLIP"),
        module_name="kandinsky",
    ),
    _transformers("T5EncoderModel", T5EncoderModel, T5Config, "t5"),
    # transformers has no such class.
    _transformers("GlideTextModel", GlideTextModel, GlideTextConfig, "glide_text_model"),
    ModelClass(name="CLIPModel", module=CLIPModel, configs=_clip, model_type="clip"),
)
MODEL_CLASSES: dict[str, ModelClass] = {kind.name: kind for kind in _CLASSES}
# Names that classes had before: the published repositories of DiT have the first.
FORMER_NAMES = {"Transformer2DModel": "DiTTransformer2DModel"}


def present_name(name: str) -> str:
    """The name of a class today, of one that a file names, which may be a former one or Flax's."""
    name = name.removeprefix("Flax")
    return FORMER_NAMES.get(name, name)


def class_of_config(config: Any) -> ModelClass:
    """The class of the networks that have a config of this type; InputError if there is none."""
    for kind in MODEL_CLASSES.values():
        if kind.config is type(config):
            return kind
    raise InputError(
        f"config: got {type(config).__name__}, expected that of one of {', '.join(MODEL_CLASSES)}"
    )


def class_name_of(module: nnx.Module) -> str:
    """The diffusers or transformers class that `module` is saved as."""
    projects = False
    if isinstance(module, CLIPTextModel):
        projects = module.text_projection is not None
    elif isinstance(module, CLIPVisionModel):
        projects = module.visual_projection is not None
    for kind in MODEL_CLASSES.values():
        if type(module) is kind.module and kind.options.get("with_projection", False) == projects:
            return kind.name
    raise InputError(
        f"module: got {type(module).__name__}, expected one of {', '.join(MODEL_CLASSES)}"
    )


def arguments(module: nnx.Module) -> Configs:
    """What `module` was built from: the inverse of `ModelClass.configs`."""
    if isinstance(module, CLIPModel):
        width = module.text_projection.kernel.shape[1]
        return module.text_model.config, module.vision_model.config, width
    return (module.config,)  # pyright: ignore[reportAttributeAccessIssue]


def rebuilt(module: nnx.Module, **options: Any) -> nnx.Module:
    """The network of `module` with other options, such as its compute dtype, as shapes."""
    kind = MODEL_CLASSES[class_name_of(module)]
    return abstract(kind.module, *arguments(module), **kind.options, **options)


def fields(configs: Configs) -> dict[str, Any]:
    """The entries of config.json that `configs` stand for."""
    if len(configs) == 1:
        return to_mapping(configs[0])
    text, vision, width = configs
    return {
        "text_config": to_mapping(text),
        "vision_config": to_mapping(vision),
        "projection_dim": width,
    }
