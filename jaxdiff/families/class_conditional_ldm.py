"""Class-conditional latent diffusion: a UNet on the latents of a VQModel (2112.10752, table 10).

The original model was never published as a diffusers folder. Folders are jaxdiff's own: `unet`, a
ClassConditionalUNet2DModel with its table of classes, diffusers' `vqvae` and `scheduler`, and in
model_index.json, if they are known, the names of classes as `id2label`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from jaxdiff.families.base import Family
from jaxdiff.families.class_labels import ClassLabel, class_names
from jaxdiff.families.components import check_latent_channels, required_component
from jaxdiff.models.unet.class_conditional import (
    ClassConditionalUNet2DConfig,
    ClassConditionalUNet2DModel,
    ClassConditionalUNetAdapter,
)
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.models.vq_model import VQModel

PIPELINE_CLASSES = ("LDMClassConditionalPipeline",)
CLASS_CONDITIONAL_LDM = Family(
    name="class-conditional LDM",
    network="unet",
    network_class=ClassConditionalUNet2DModel,
    adapter=ClassConditionalUNetAdapter,
    latent_codec="vqvae",
    text_encoders=(),
    extras=(ClassLabel(1000),),
    defaults={"guidance_scale": 3.0, "steps": 50},
)
FAMILIES = (CLASS_CONDITIONAL_LDM,)
FROM_SCRATCH = {"LDMClassConditionalPipeline": CLASS_CONDITIONAL_LDM}


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together.

    `options` are the plain values of model_index.json, with names of classes as `id2label`.
    """
    network = required_component(components, "unet", ClassConditionalUNet2DModel, source)
    codec = required_component(components, "vqvae", (VQModel, AutoencoderKL), source)
    config = cast(ClassConditionalUNet2DConfig, cast(Any, network).config)
    channels = cast(VQModel, codec).config.latent_channels
    check_latent_channels(config.in_channels, channels, name="unet", source=source)
    names = class_names(options, config.num_classes, source=source)
    return dataclasses.replace(
        CLASS_CONDITIONAL_LDM, extras=(ClassLabel(config.num_classes, names),)
    )
