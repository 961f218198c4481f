"""Kandinsky 2.2: a prior from text to embeddings of images, and a decoder of them (2310.03502).

After unCLIP (2204.06125): the prior denoises CLIP's image embeddings, the decoder denoises latents
of a VQ autoencoder (MoVQ, which quantises nothing here) and reads an embedding instead of a text.
A decoder that is trained on the latents of an AutoencoderKL has that in its place; such folders are
jaxdiff's own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import check_latent_channels, required_component
from jaxdiff.families.image_embeddings import IMAGE_ENCODER, ImageEmbedding
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.latent_codec import ImageEmbeddings
from jaxdiff.models.prior.adapter import PriorAdapter
from jaxdiff.models.prior.module import PriorTransformer
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.models.vq_model import VQModel

_PRIORS = ("KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
_DECODERS = ("KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline")
PIPELINE_CLASSES = (*_PRIORS, *_DECODERS)


def _embeddings(prior: PriorTransformer) -> ImageEmbeddings:
    return ImageEmbeddings(prior.clip_mean, prior.clip_std)


PRIOR = Family(
    name="Kandinsky 2.2 prior",
    network="prior",
    network_class=PriorTransformer,
    adapter=PriorAdapter,
    latent_codec=None,
    embeddings=_embeddings,
    image_encoder=IMAGE_ENCODER,
    text_encoders=(
        TextEncoder(pooled=True, mask="context_mask", max_chunks=1, skips_layers=False),
    ),
    defaults={"guidance_scale": 4.0, "steps": 25},
)
DECODER = Family(
    name="Kandinsky 2.2",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
    latent_codec="movq",
    image_encoder=IMAGE_ENCODER,
    text_encoders=(),
    extras=(ImageEmbedding(),),
    defaults={"guidance_scale": 4.0, "steps": 50},
)
FAMILIES = (PRIOR, DECODER)
FROM_SCRATCH = {_PRIORS[0]: PRIOR, _DECODERS[0]: DECODER}


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together."""
    if options["_class_name"] in _PRIORS:
        return _prior(components, source)
    unet = required_component(components, "unet", UNet2DConditionModel, source)
    codec = required_component(components, "movq", (VQModel, AutoencoderKL), source)
    config = cast(UNet2DConditionModel, unet).config
    if config.addition_embed_type != "image" or config.context_projection != "image_proj":
        raise InputError(
            f"{source}: unet: got addition_embed_type {config.addition_embed_type} and "
            f"encoder_hid_dim_type {config.context_projection}, expected image and image_proj"
        )
    channels = cast(VQModel, codec).config.latent_channels
    check_latent_channels(config.in_channels, channels, name="unet", source=source)
    extra = ImageEmbedding(width=cast(int, config.encoder_hid_dim))
    return dataclasses.replace(DECODER, latent_multiple=config.size_divisor, extras=(extra,))


def _prior(components: Mapping[str, nnx.Module], source: str) -> Family:
    prior = required_component(components, "prior", PriorTransformer, source)
    encoder = required_component(components, "text_encoder", CLIPTextModel, source)
    config, text = cast(PriorTransformer, prior).config, cast(CLIPTextModel, encoder).config
    widths = text.hidden_size, text.projection_dim, text.max_position_embeddings
    wanted = config.embedding_dim, config.pooled_width, config.num_embeddings
    names = "hidden_size", "projection_dim", "max_position_embeddings"
    for name, got, expected in zip(names, widths, wanted, strict=True):
        if got != expected:
            raise InputError(
                f"{source}: text_encoder: got {name} {got}, expected {expected}, as the prior has"
            )
    return PRIOR
