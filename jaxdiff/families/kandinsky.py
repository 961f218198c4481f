"""Kandinsky 2.1 and 2.2: a prior from text to embeddings of images, and a decoder (2310.03502).

After unCLIP (2204.06125): the prior denoises CLIP's image embeddings, the decoder denoises latents
of a VQ autoencoder (MoVQ, which quantises nothing here). The decoder of 2.1 reads a text beside the
embedding, that of 2.2 the embedding alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import check_latent_channels, required_component
from jaxdiff.families.image_embeddings import ImageEmbedding
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.latent_codec import ImageEmbeddings
from jaxdiff.models.multilingual_clip.module import MultilingualCLIP
from jaxdiff.models.prior.adapter import PriorAdapter
from jaxdiff.models.prior.module import PriorTransformer
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vq_model import VQModel

_PRIOR_21 = "KandinskyPriorPipeline"
_PRIORS = (_PRIOR_21, "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
_DECODERS = (
    "KandinskyPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22Img2ImgPipeline",
)
PIPELINE_CLASSES = (*_PRIORS, *_DECODERS)
_IMAGE_NOISE = VPSchedule(beta_start=1e-4, beta_end=0.02)


def _embeddings(prior: PriorTransformer) -> ImageEmbeddings:
    return ImageEmbeddings(prior.clip_mean, prior.clip_std)


def _image_level(
    strengths: Float[NDArray, "b"],
) -> tuple[Float[NDArray, "b"], Float[NDArray, "b"]]:
    """Alpha and sigma of images to begin with, by another schedule than that of sampling.

    So the authors' code has it, and diffusers' pipeline after it.
    """
    steps = (_IMAGE_NOISE.num_discrete * strengths).astype(np.int32) - 2
    return _IMAGE_NOISE.alpha_sigma(np.maximum(steps, 0))


PRIOR = Family(
    name="Kandinsky 2.2 prior",
    network="prior",
    network_class=PriorTransformer,
    adapter=PriorAdapter,
    latent_codec=None,
    embeddings=_embeddings,
    text_encoders=(
        TextEncoder(pooled=True, mask="context_mask", max_chunks=1, skips_layers=False),
    ),
    defaults={"guidance_scale": 4.0, "steps": 25},
)
PRIOR_21 = dataclasses.replace(PRIOR, name="Kandinsky 2.1 prior")
DECODER = Family(
    name="Kandinsky 2.2",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
    latent_codec="movq",
    text_encoders=(),
    extras=(ImageEmbedding(),),
    defaults={"guidance_scale": 4.0, "steps": 50, "height": 512, "width": 512},
)
DECODER_21 = dataclasses.replace(
    DECODER,
    name="Kandinsky 2.1",
    image_level=_image_level,
    text_encoders=(TextEncoder(pooled=True, length=77, max_chunks=1, skips_layers=False),),
    defaults={**DECODER.defaults, "steps": 100},
)
FAMILIES = (PRIOR_21, DECODER_21, PRIOR, DECODER)
# By addition_embed_type and encoder_hid_dim_type of the UNet.
_BY_CONDITIONING = {
    ("text_image", "text_image_proj"): DECODER_21,
    ("image", "image_proj"): DECODER,
}


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together."""
    if options["_class_name"] in _PRIORS:
        family = PRIOR_21 if options["_class_name"] == _PRIOR_21 else PRIOR
        _check_prior(components, source)
        return family
    unet = required_component(components, "unet", UNet2DConditionModel, source)
    codec = required_component(components, "movq", VQModel, source)
    config = cast(UNet2DConditionModel, unet).config
    conditioning = config.addition_embed_type, config.context_projection
    family = _BY_CONDITIONING.get(cast(Any, conditioning))
    if family is None:
        expected = " or ".join(f"{added} and {tokens}" for added, tokens in _BY_CONDITIONING)
        raise InputError(
            f"{source}: unet: got addition_embed_type {conditioning[0]} and encoder_hid_dim_type "
            f"{conditioning[1]}, expected {expected}"
        )
    channels = cast(VQModel, codec).config.latent_channels
    check_latent_channels(config.in_channels, channels, name="unet", source=source)
    width = config.encoder_hid_dim
    if family is DECODER_21:
        _check_text_encoder(components, config, source)
        width = config.cross_attention_dim
    extra = ImageEmbedding(width=cast(int, width))
    return dataclasses.replace(family, latent_multiple=config.size_divisor, extras=(extra,))


def _check_prior(components: Mapping[str, nnx.Module], source: str) -> None:
    """InputError unless the text encoder gives what the prior takes."""
    prior = required_component(components, "prior", PriorTransformer, source)
    encoder = required_component(components, "text_encoder", CLIPTextModel, source)
    config, text = cast(PriorTransformer, prior).config, cast(CLIPTextModel, encoder).config
    wanted = {
        "hidden_size": config.embedding_dim,
        "projection_dim": config.pooled_width,
        "max_position_embeddings": config.num_embeddings,
    }
    _check_fields(text, wanted, "prior", source)


def _check_text_encoder(
    components: Mapping[str, nnx.Module], config: UNet2DConditionConfig, source: str
) -> None:
    """InputError unless the text encoder gives what the UNet of 2.1 takes."""
    encoder = required_component(components, "text_encoder", MultilingualCLIP, source)
    text = cast(MultilingualCLIP, encoder).config
    wanted = {"hidden_size": config.encoder_hid_dim, "numDims": config.cross_attention_dim}
    _check_fields(text, wanted, "UNet", source)


def _check_fields(config: Any, wanted: Mapping[str, Any], network: str, source: str) -> None:
    for name, expected in wanted.items():
        if (got := getattr(config, name)) != expected:
            raise InputError(
                f"{source}: text_encoder: got {name} {got}, expected {expected}, as the "
                f"{network} has"
            )
