"""UNets on pixels with the hidden states of CLIP's text encoder, alone or as stages of a cascade.

As DeepFloyd IF's stages are, with another text encoder. diffusers has no pipeline of pixels with
CLIP: such folders are jaxdiff's own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import check_context_width, required_component
from jaxdiff.families.low_resolution import NOISE, low_resolution_extras, pixel_stage
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.module import UNet2DConditionModel

CLASS_NAME = "PixelCLIPPipeline"
PIPELINE_CLASSES = (CLASS_NAME,)
PIXELS = Family(
    name="pixels with CLIP",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
    latent_codec=None,
    text_encoders=(TextEncoder(),),
)
SUPER_RESOLUTION = dataclasses.replace(
    PIXELS,
    name="pixels with CLIP, super-resolution",
    extras=low_resolution_extras(VPSchedule(beta_schedule="squaredcos_cap_v2"), **NOISE),
)
FAMILIES = (PIXELS, SUPER_RESOLUTION)
FROM_SCRATCH = {CLASS_NAME: PIXELS}


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together.

    `options` has the config of NOISING_SCHEDULER if the UNet enlarges images.
    """
    unet = required_component(components, "unet", UNet2DConditionModel, source)
    encoder = required_component(components, "text_encoder", CLIPTextModel, source)
    config = cast(UNet2DConditionModel, unet).config
    check_context_width(encoder, config.context_width, network="UNet", source=source)
    family = pixel_stage(PIXELS, SUPER_RESOLUTION, config, options, source)
    if bool(config.concatenated_channels) != config.has_classes:
        raise InputError(
            f"{source}: unet: got {config.in_channels} channels in, expected an embedding of the "
            "noise level (class_embed_type or num_class_embeds) where an image is enlarged, and "
            "none elsewhere"
        )
    return family
