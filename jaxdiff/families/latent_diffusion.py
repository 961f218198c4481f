"""Latent diffusion (2112.10752): a UNet on the latents of an autoencoder, as first published.

Its text-to-image model has a text encoder that was trained with it, and reads 77 tokens, padding
among them.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny
from jaxdiff.models.ldm_bert.module import LDMBertModel
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL

PIPELINE_CLASSES = ("LDMTextToImagePipeline",)
LENGTH = 77  # tokens of a text, whatever the tokenizer says

TEXT_TO_IMAGE = Family(
    name="Latent Diffusion text-to-image",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
    latent_codec="vqvae",
    text_encoders=(TextEncoder(component="bert", length=LENGTH, max_chunks=1),),
)
FAMILIES = (TEXT_TO_IMAGE,)


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together."""
    del options
    unet = components.get("unet")
    codec, bert = components.get("vqvae"), components.get("bert")
    if not isinstance(unet, UNet2DConditionModel):
        raise _unfit(source, "unet", unet, "UNet2DConditionModel")
    if not isinstance(codec, AutoencoderKL | AutoencoderTiny):
        raise _unfit(source, "vqvae", codec, "AutoencoderKL or AutoencoderTiny")
    if not isinstance(bert, LDMBertModel):
        raise _unfit(source, "bert", bert, "LDMBertModel")
    width, wanted = bert.config.d_model, unet.config.per_block("cross_attention_dim")[0]
    if width != wanted:
        raise InputError(
            f"{source}: bert: got hidden states of width {width}, expected {wanted}, as the UNet "
            "has"
        )
    if unet.config.in_channels != codec.config.latent_channels:
        raise InputError(
            f"{source}: unet: got in_channels {unet.config.in_channels}, expected "
            f"{codec.config.latent_channels}, as the autoencoder has"
        )
    return TEXT_TO_IMAGE


def _unfit(source: str, name: str, module: Any, expected: str) -> InputError:
    got = "none" if module is None else type(module).__name__
    return InputError(f"{source}: {name}: got {got}, expected {expected}")
