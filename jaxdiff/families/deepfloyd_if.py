"""DeepFloyd IF: a cascade of UNets on pixels, with the hidden states of T5 (after 2205.11487).

The first stage generates images of 64 pixels a side from text, the second makes 256 of them. The
third is Stable Diffusion's upscaler.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import check_context_width, required_component
from jaxdiff.families.low_resolution import NOISE, low_resolution_extras, pixel_stage
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.module import UNet2DConditionModel

_TASKS = ("", "Img2Img", "Inpainting")
PIPELINE_CLASSES = (
    *(f"IF{task}Pipeline" for task in _TASKS),
    *(f"IF{task}SuperResolutionPipeline" for task in _TASKS),
)
IF = Family(
    name="DeepFloyd IF",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
    latent_codec=None,
    text_encoders=(
        TextEncoder(
            length=77, max_chunks=1, skips_layers=False, masks_padding=True, lowercases=True
        ),
    ),
    defaults={"guidance_scale": 7.0, "steps": 100},
)
SUPER_RESOLUTION = dataclasses.replace(
    IF,
    name="DeepFloyd IF super-resolution",
    extras=low_resolution_extras(VPSchedule(beta_schedule="squaredcos_cap_v2"), **NOISE),
    defaults={"guidance_scale": 4.0, "steps": 50},
)
FAMILIES = (IF, SUPER_RESOLUTION)


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together.

    `options` has the config of the second stage's NOISING_SCHEDULER.
    """
    unet = required_component(components, "unet", UNet2DConditionModel, source)
    config = cast(UNet2DConditionModel, unet).config
    encoder = required_component(components, "text_encoder", T5EncoderModel, source)
    check_context_width(encoder, config.context_width, network="UNet", source=source)
    return pixel_stage(IF, SUPER_RESOLUTION, config, options, source)
