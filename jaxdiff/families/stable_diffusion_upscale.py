"""Stable Diffusion's upscaler: images of four times the side, from text and an image with noise.

A UNet on the latents of a VAE with 4 pixels a side; the image, of the latents' size, is further
channels. It is the third stage of DeepFloyd IF, too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import check_context_width, required_component
from jaxdiff.families.low_resolution import low_resolution_extras, noising_schedule
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL

PIPELINE_CLASSES = ("StableDiffusionUpscalePipeline",)
NOISING_SCHEDULER = "low_res_scheduler"
NOISE_LEVEL = 20
MAX_NOISE_LEVEL = 350  # unless model_index.json says another max_noise_level
UPSCALE = Family(
    name="Stable Diffusion upscaler",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
    text_encoders=(TextEncoder(),),
    extras=low_resolution_extras(
        VPSchedule(beta_schedule="scaled_linear"), noise_level=NOISE_LEVEL, highest=MAX_NOISE_LEVEL
    ),
    defaults={"guidance_scale": 9.0, "steps": 75},
)
FAMILIES = (UPSCALE,)


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together.

    `options` has the config of NOISING_SCHEDULER and, maybe, `max_noise_level`.
    """
    unet = required_component(components, "unet", UNet2DConditionModel, source)
    vae = cast(AutoencoderKL, required_component(components, "vae", AutoencoderKL, source))
    encoder = required_component(components, "text_encoder", CLIPTextModel, source)
    config = cast(UNet2DConditionModel, unet).config
    check_context_width(encoder, config.context_width, network="UNet", source=source)
    channels = vae.config.latent_channels
    if config.channels != (channels + 3, channels) or config.num_class_embeds is None:
        raise InputError(
            f"{source}: unet: got {config.in_channels} channels in and {config.channels[1]} out, "
            f"expected {channels + 3}, of latents and an image, and {channels}, with "
            "num_class_embeds for its noise levels"
        )
    highest = min(options.get("max_noise_level", MAX_NOISE_LEVEL), config.num_class_embeds - 1)
    schedule = noising_schedule(options, NOISING_SCHEDULER, source)
    extras = low_resolution_extras(schedule, noise_level=NOISE_LEVEL, highest=highest)
    return dataclasses.replace(UPSCALE, extras=extras)
