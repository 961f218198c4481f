"""PixArt's transformer on the latents of a VAE, with the hidden states of CLIP's text encoder.

As Stable Diffusion 1 and 2 have it, with another network. diffusers has the network (2310.00426),
but no pipeline of it with CLIP: such folders are jaxdiff's own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import (
    check_context_width,
    check_latent_channels,
    required_component,
)
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.pixart.adapter import PixArtAdapter
from jaxdiff.models.pixart.module import PixArtTransformer2DModel
from jaxdiff.models.vae import AutoencoderKL

PIPELINE_CLASSES = ("PixArtCLIPPipeline",)
PIXART_CLIP = Family(
    name="PixArt with CLIP",
    network="transformer",
    network_class=PixArtTransformer2DModel,
    adapter=PixArtAdapter,
    text_encoders=(TextEncoder(),),
    defaults={"guidance_scale": 4.5, "steps": 20},
)
FAMILIES = (PIXART_CLIP,)
FROM_SCRATCH = {"PixArtCLIPPipeline": PIXART_CLIP}


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together."""
    del options
    network = required_component(components, "transformer", PixArtTransformer2DModel, source)
    vae = required_component(components, "vae", (AutoencoderKL, AutoencoderTiny), source)
    encoder = required_component(components, "text_encoder", CLIPTextModel, source)
    config = cast(PixArtTransformer2DModel, network).config
    channels = cast(AutoencoderKL, vae).config.latent_channels
    check_latent_channels(config.in_channels, channels, name="transformer", source=source)
    check_context_width(encoder, config.context_width, network="transformer", source=source)
    return dataclasses.replace(PIXART_CLIP, latent_multiple=config.patch_size)
