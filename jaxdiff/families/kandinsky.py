"""Kandinsky 2.1 and 2.2: a prior from text to embeddings of images, and a decoder (2310.03502).

After unCLIP (2204.06125): the prior denoises CLIP's image embeddings, the decoder denoises latents
of a VQ autoencoder (MoVQ, which quantises nothing here). The decoder of 2.1 reads a text beside the
embedding, that of 2.2 the embedding alone. Both have variants for inpainting, and 2.2 one that
takes an image of depths (ControlNet's hint). A decoder that is trained on the latents of an
AutoencoderKL has that in its place; such folders are jaxdiff's own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import numpy as np
from flax import nnx

from jaxdiff.checkpoints.pipelines import IMAGE_ENCODER
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, NDArray
from jaxdiff.data.image_arrays import image_array
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import has_mask_channels, required_component
from jaxdiff.families.extras import Extra, ExtraInputs, Option
from jaxdiff.families.image_embeddings import ImageEmbedding
from jaxdiff.families.image_option import IMAGE_OPTION
from jaxdiff.families.unclip_prior import check_prior, unclip_prior
from jaxdiff.models.multilingual_clip.module import MultilingualCLIP
from jaxdiff.models.network_adapter import CHANNELS
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.conditioning import HINT_SCALE
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.models.vq_model import VQModel

_PRIOR_21 = "KandinskyPriorPipeline"
_PRIORS = (_PRIOR_21, "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
PIPELINE_CLASSES = (
    *_PRIORS,
    "KandinskyPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22InpaintPipeline",
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
)
_IMAGE_NOISE = VPSchedule(beta_start=1e-4, beta_end=0.02)


def _image_level(
    strengths: Float[NDArray, "b"],
) -> tuple[Float[NDArray, "b"], Float[NDArray, "b"]]:
    """Alpha and sigma of images to begin with, by another schedule than that of sampling.

    So the authors' code has it, and diffusers' pipeline after it.
    """
    steps = (_IMAGE_NOISE.num_discrete * strengths).astype(np.int32) - 2
    return _IMAGE_NOISE.alpha_sigma(np.maximum(steps, 0))


def _repainted(mask: Float[NDArray, "b h w 1"]) -> Float[NDArray, "b h w 1"]:
    """A mask of latents with their neighbours, but for those across one of the diagonals."""
    height, width = mask.shape[1:3]
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1), (0, 0)))
    moves = ((1, 1), (0, 1), (1, 0), (0, 0), (2, 1), (1, 2), (2, 2))
    return np.max([padded[:, y : y + height, x : x + width] for y, x in moves], axis=0)


@dataclasses.dataclass(frozen=True)
class KnownLatents(Extra):
    """The latents (of so many channels) that are known, and where; without a mask none are.

    The sampler puts them back after each step, too.
    """

    channels: int = 4

    argument = CHANNELS
    untrainable = "got a decoder for inpainting, expected one that is not"

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k h w c"]:
        known = np.zeros((len(inputs.guidance_scales), *inputs.latent_size, 1), np.float32)
        if inputs.mask is None:
            return inputs.for_streams(np.repeat(known, self.channels + 1, axis=-1))
        latents, known = inputs.image_latents(), 1 - inputs.downsample(inputs.mask)
        if latents is None:
            raise InputError("mask: got it without an image, expected the image that is known")
        return inputs.for_streams(np.concatenate([latents * known, known], axis=-1))

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        raise NotImplementedError(self.untrainable)


@dataclasses.dataclass(frozen=True)
class KnownLatentsAlone(KnownLatents):
    """Those of 2.1, whose sampler does not put them back."""

    uses_mask = True


@dataclasses.dataclass(frozen=True)
class Hint(Extra):
    """The depths of what is generated, near ones white, as an image of any size."""

    argument = "hint"
    options: ClassVar[Mapping[str, Option]] = {"hint": IMAGE_OPTION}
    untrainable = "got a decoder with a hint, expected one without"

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k h w 3"]:
        hints = [options.get(self.argument) for options in inputs.options]
        if any(hint is None for hint in hints):
            raise InputError("hint: got none, expected an image of depths")
        height, width = (HINT_SCALE * side for side in inputs.latent_size)
        pixels = (image_array(hints, height, width) + 1) / 2
        return inputs.for_streams(pixels.astype(np.float32))

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b h w 3"]:
        raise NotImplementedError(self.untrainable)


PRIOR = unclip_prior("Kandinsky 2.2 prior")
PRIOR_21 = dataclasses.replace(PRIOR, name="Kandinsky 2.1 prior")
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
DECODER_21 = dataclasses.replace(
    DECODER,
    name="Kandinsky 2.1",
    image_level=_image_level,
    text_encoders=(TextEncoder(pooled=True, length=77, max_chunks=1, skips_layers=False),),
    defaults={**DECODER.defaults, "steps": 100},
)
CONTROLNET = dataclasses.replace(
    DECODER, name="Kandinsky 2.2 ControlNet", extras=(ImageEmbedding(), Hint())
)
FAMILIES = (PRIOR_21, DECODER_21, PRIOR, DECODER, CONTROLNET)
FROM_SCRATCH = {"KandinskyV22PriorPipeline": PRIOR, "KandinskyV22Pipeline": DECODER}
# By addition_embed_type and encoder_hid_dim_type of the UNet.
_BY_CONDITIONING = {
    ("text_image", "text_image_proj"): DECODER_21,
    ("image", "image_proj"): DECODER,
    ("image_hint", "image_proj"): CONTROLNET,
}


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together."""
    if options["_class_name"] in _PRIORS:
        family = PRIOR_21 if options["_class_name"] == _PRIOR_21 else PRIOR
        check_prior(family, components, source)
        return family
    unet = required_component(components, "unet", UNet2DConditionModel, source)
    codec = required_component(components, "movq", (VQModel, AutoencoderKL), source)
    config = cast(UNet2DConditionModel, unet).config
    conditioning = config.addition_embed_type, config.context_projection
    family = _BY_CONDITIONING.get(cast(Any, conditioning))
    if family is None:
        expected = " or ".join(f"{added} and {tokens}" for added, tokens in _BY_CONDITIONING)
        raise InputError(
            f"{source}: unet: got addition_embed_type {conditioning[0]} and encoder_hid_dim_type "
            f"{conditioning[1]}, expected {expected}"
        )
    width, known = config.encoder_hid_dim, KnownLatents
    if family is DECODER_21:
        _check_text_encoder(components, config, source)
        width, known = config.cross_attention_dim, KnownLatentsAlone
    extras = (ImageEmbedding(width=cast(int, width)), *family.extras[1:])
    family = dataclasses.replace(family, latent_multiple=config.size_divisor, extras=extras)
    channels = cast(VQModel, codec).config.latent_channels
    if not has_mask_channels(config, channels, source=source):
        return family
    return dataclasses.replace(family, latent_mask=_repainted, extras=(*extras, known(channels)))


def _check_text_encoder(
    components: Mapping[str, nnx.Module], config: UNet2DConditionConfig, source: str
) -> None:
    """InputError unless the text encoder gives what the UNet of 2.1 takes."""
    encoder = required_component(components, "text_encoder", MultilingualCLIP, source)
    text = cast(MultilingualCLIP, encoder).config
    wanted = {"hidden_size": config.encoder_hid_dim, "numDims": config.cross_attention_dim}
    for name, expected in wanted.items():
        if (got := getattr(text, name)) != expected:
            raise InputError(
                f"{source}: text_encoder: got {name} {got}, expected {expected}, as the UNet has"
            )
