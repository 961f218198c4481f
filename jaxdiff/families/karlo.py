"""Karlo: an unCLIP (2204.06125) of three stages, of which one folder has all.

The prior makes CLIP's embedding of an image of a text, the decoder an image of 64 pixels a side of
both, and the third stage enlarges it to 256. Where a given image is to be varied there is an image
encoder in place of the prior.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, NDArray
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import check_context_width, required_component
from jaxdiff.families.extras import Extra, ExtraInputs
from jaxdiff.families.image_embeddings import IMAGE_EMBEDS
from jaxdiff.families.image_prompts import ImagePrompt
from jaxdiff.families.unclip_prior import check_prior, unclip_prior
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.karlo import KarloDecoder, KarloDecoderAdapter, KarloSuperResolution
from jaxdiff.models.network_adapter import CHANNELS
from jaxdiff.models.unclip import UnCLIPTextProjConfig, UnCLIPTextProjModel
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.unet.unet_2d import UNet2DModel

# Of the stages; diffusers has no such classes.
PRIOR_CLASS, DECODER_CLASS = "UnCLIPPriorPipeline", "UnCLIPDecoderPipeline"
VARIATION_CLASS = "UnCLIPVariationDecoderPipeline"
SUPER_RESOLUTION_CLASS = "UnCLIPSuperResolutionPipeline"
PIPELINE_CLASSES = (PRIOR_CLASS, DECODER_CLASS, VARIATION_CLASS, SUPER_RESOLUTION_CLASS)
PIXEL_CHANNELS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEmbeddingOrLearned(ImagePrompt):
    """The embedding of an image; in streams without prompts that which `text_proj` learned."""

    text_proj: UnCLIPTextProjModel | None = dataclasses.field(compare=False, repr=False)

    argument = IMAGE_EMBEDS

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k d"]:
        module = cast(UnCLIPTextProjModel, self.text_proj)
        learned = np.asarray(module.learned_classifier_free_guidance_embeddings[...], np.float32)
        return self.for_prompted(self.embeddings(inputs), learned, inputs.prompted)


@dataclasses.dataclass(frozen=True)
class ResizedImage(Extra):
    """The image to enlarge at the size of the result, resized by a bicubic filter."""

    argument = CHANNELS
    enlarges = True
    untrainable = "got two networks that enlarge images, expected one"

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k h w 3"]:
        if inputs.low_resolution is None:
            raise InputError("image: got none, expected the image to enlarge")
        return inputs.for_streams(self.resized(inputs.low_resolution, inputs.latent_size))

    def resized(
        self, images: Float[NDArray, "b h3 w3 3"], size: tuple[int, ...]
    ) -> Float[NDArray, "b h w 3"]:
        """Images of this height and width, as PyTorch resizes them without aliasing."""
        shape = (len(images), *size, PIXEL_CHANNELS)
        return np.asarray(jax.image.resize(jnp.asarray(images), shape, "cubic"))

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b h w 3"]:
        raise NotImplementedError(self.untrainable)


PRIOR = unclip_prior("Karlo prior")
DECODER = Family(
    name="Karlo",
    network="decoder",
    network_class=UNet2DConditionModel,
    adapter=KarloDecoderAdapter,
    latent_codec=None,
    text_encoders=(
        TextEncoder(pooled=True, mask="context_mask", max_chunks=1, skips_layers=False),
    ),
    extras=(ImageEmbeddingOrLearned(width=768, text_proj=None),),
    defaults={"guidance_scale": 8.0, "steps": 25},
)
SUPER_RESOLUTION = Family(
    name="Karlo super-resolution",
    network="super_res_first",
    network_class=UNet2DModel,
    adapter=UNetAdapter,
    latent_codec=None,
    text_encoders=(),
    extras=(ResizedImage(),),
    defaults={"guidance": "none", "guidance_scale": 1.0, "steps": 7},
)
FAMILIES = (PRIOR, DECODER, SUPER_RESOLUTION)


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together."""
    class_name = options["_class_name"]
    if class_name == PRIOR_CLASS:
        check_prior(PRIOR, components, source)
        return PRIOR
    if class_name == SUPER_RESOLUTION_CLASS:
        return _super_resolution(components, source)
    return _decoder(components, source, varies=class_name == VARIATION_CLASS)


def _decoder(components: Mapping[str, nnx.Module], source: str, *, varies: bool) -> Family:
    decoder = required_component(components, "decoder", UNet2DConditionModel, source)
    encoder = required_component(components, "text_encoder", CLIPTextModel, source)
    module = required_component(components, "text_proj", UnCLIPTextProjModel, source)
    config, text_proj = cast(UNet2DConditionModel, decoder).config, cast(Any, module)
    _check_pixels("decoder", config, PIXEL_CHANNELS, source)
    own: UnCLIPTextProjConfig = text_proj.config
    check_context_width(encoder, own.clip_embeddings_dim, network="text_proj", source=source)
    widths = {"text_encoder": cast(CLIPTextModel, encoder).config.projection_dim}
    if varies:
        encoder = required_component(components, "image_encoder", CLIPVisionModel, source)
        widths["image_encoder"] = cast(CLIPVisionModel, encoder).config.projection_dim
    for name, width in widths.items():
        if width != own.clip_embeddings_dim:
            raise InputError(
                f"{source}: {name}: got projection_dim {width}, expected "
                f"{own.clip_embeddings_dim}, as text_proj has"
            )
    got = config.class_embed_type, config.time_width, config.context_width
    wanted = "identity", own.time_embed_dim, own.cross_attention_dim
    if got != wanted or not config.masks_context:
        raise InputError(
            f"{source}: decoder: got class_embed_type {got[0]}, a time embedding of width {got[1]} "
            f"and a context of width {got[2]}, expected {wanted[0]}, {wanted[1]} and {wanted[2]}, "
            "as text_proj has, and blocks that can hide tokens"
        )
    extra = ImageEmbeddingOrLearned(
        width=own.clip_embeddings_dim, text_proj=text_proj, reads_image_prompt=varies
    )
    return dataclasses.replace(
        DECODER,
        adapter=functools.partial(_decoder_adapter, text_proj),
        latent_multiple=config.size_divisor,
        extras=(extra,),
    )


def _decoder_adapter(
    text_proj: UnCLIPTextProjModel, decoder: UNet2DConditionModel, prediction_type: str
) -> KarloDecoderAdapter:
    return KarloDecoderAdapter(KarloDecoder(decoder, text_proj), prediction_type)


def _super_resolution(components: Mapping[str, nnx.Module], source: str) -> Family:
    names = "super_res_first", "super_res_last"
    first, last = (
        cast(UNet2DModel, required_component(components, name, UNet2DModel, source))
        for name in names
    )
    for name, unet in zip(names, (first, last), strict=True):
        _check_pixels(name, unet.unet_config, 2 * PIXEL_CHANNELS, source)
        if unet.unet_config.has_classes:
            raise InputError(f"{source}: {name}: got classes, expected none")
    return dataclasses.replace(
        SUPER_RESOLUTION,
        adapter=functools.partial(_pair_adapter, last),
        latent_multiple=max(unet.unet_config.size_divisor for unet in (first, last)),
    )


def _pair_adapter(last: UNet2DModel, first: UNet2DModel, prediction_type: str) -> UNetAdapter:
    return UNetAdapter(KarloSuperResolution(first, last), prediction_type)


def _check_pixels(name: str, config: UNet2DConditionConfig, channels: int, source: str) -> None:
    """InputError unless so many channels go in and those of an image come out."""
    if (config.in_channels, config.channels[1]) != (channels, PIXEL_CHANNELS):
        raise InputError(
            f"{source}: {name}: got {config.in_channels} channels in and {config.out_channels} "
            f"out, expected {channels} in, and out {PIXEL_CHANNELS}, with or without a variance"
        )
