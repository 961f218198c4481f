"""GLIDE: a cascade of two UNets on pixels, each with a transformer of its own for the text.

The first (2112.10741, section 4) generates images of 64 pixels a side, the second enlarges them to
256. Pixels attend to the states of the transformer, whose pooled embedding joins that of the time.
Both exist for inpainting, too (section 4.1): they take an image where it is known, and the mask.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints.layout_glide import IMAGE_CHANNELS, MASK_CHANNELS
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, NDArray
from jaxdiff.families.base import Family, TextEncoder
from jaxdiff.families.components import check_context_width, required_component
from jaxdiff.families.extras import (
    LOW_RESOLUTION,
    LOW_RESOLUTION_NOISE,
    Extra,
    ExtraInputs,
)
from jaxdiff.families.low_resolution import resize_bilinear
from jaxdiff.models.glide_text.module import GlideTextModel
from jaxdiff.models.network_adapter import CHANNELS
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.module import UNet2DConditionModel

PIPELINE_CLASSES = ("GlidePipeline",)


class _Channels(Extra):
    """Further channels of the network."""

    argument = CHANNELS

    @abstractmethod
    def channels(self, inputs: ExtraInputs) -> Float[NDArray, "b h w c"]:
        """Those of each image of a batch of requests."""

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k h w c"]:
        return inputs.for_streams(self.channels(inputs).astype(np.float32))

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        raise NotImplementedError(self.untrainable)


@dataclasses.dataclass(frozen=True)
class LowResolution(_Channels):
    """The image to enlarge in 8 bits, at the size of the result."""

    enlarges = True

    def channels(self, inputs: ExtraInputs) -> Float[NDArray, "b h w 3"]:
        if inputs.low_resolution is None:
            raise InputError("image: got none, expected the image to enlarge")
        return np.asarray(self._upsampled(inputs.low_resolution, inputs.latent_size))

    def of_batch(
        self, batch: Mapping[str, Array], dropped: Bool[Array, "b"]
    ) -> Float[Array, "b h w 3"]:
        """The batch's LOW_RESOLUTION."""
        _, height, width, _ = batch[LOW_RESOLUTION_NOISE].shape
        return jnp.asarray(self._upsampled(batch[LOW_RESOLUTION], (height, width)))

    def _upsampled(
        self, image: Float[Array | NDArray, "b h3 w3 3"], size: tuple[int, ...]
    ) -> Float[Array | NDArray, "b h w 3"]:
        rounded = ((image.clip(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        return resize_bilinear(rounded, size, align_corners=False)


@dataclasses.dataclass(frozen=True)
class KnownPixels(_Channels):
    """The pixels that are known, and where they are; without a mask none are.

    The sampler puts them back after each step, too.
    """

    untrainable = "got a network for inpainting, expected one that is not"

    def channels(self, inputs: ExtraInputs) -> Float[NDArray, "b h w 4"]:
        known = np.zeros((len(inputs.guidance_scales), *inputs.latent_size, 1), np.float32)
        if inputs.mask is None:
            return np.repeat(known, MASK_CHANNELS, axis=-1)
        image = inputs.image_latents()
        if image is None:
            raise InputError("mask: got it without an image, expected the image that is known")
        known = 1 - inputs.mask
        return np.concatenate([image * known, known], axis=-1)


@dataclasses.dataclass(frozen=True)
class KnownPixelsAndLowResolution(_Channels):
    """The pixels that are known, and behind them the image to enlarge."""

    enlarges = True
    untrainable = KnownPixels.untrainable

    def channels(self, inputs: ExtraInputs) -> Float[NDArray, "b h w 7"]:
        parts = [extra.channels(inputs) for extra in (KnownPixels(), LowResolution())]
        return np.concatenate(parts, axis=-1)


GLIDE = Family(
    name="GLIDE",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
    latent_codec=None,
    text_encoders=(
        TextEncoder(length=128, max_chunks=1, pooled=True, skips_layers=False, lowercases=True),
    ),
    pooled_argument="class_labels",
    defaults={"guidance_scale": 3.0, "steps": 100},
)
UPSAMPLER = dataclasses.replace(
    GLIDE,
    name="GLIDE upsampler",
    extras=(LowResolution(),),
    defaults={"guidance_scale": 1.0, "steps": 27},
)
# By the channels beside those of the noisy image.
VARIANTS = {
    0: GLIDE,
    MASK_CHANNELS: dataclasses.replace(GLIDE, extras=(KnownPixels(),)),
    IMAGE_CHANNELS: UPSAMPLER,
    IMAGE_CHANNELS + MASK_CHANNELS: dataclasses.replace(
        UPSAMPLER, extras=(KnownPixelsAndLowResolution(),)
    ),
}
FAMILIES = (GLIDE, UPSAMPLER)


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together."""
    del options
    unet = required_component(components, "unet", UNet2DConditionModel, source)
    config = cast(UNet2DConditionModel, unet).config
    encoder = required_component(components, "text_encoder", GlideTextModel, source)
    check_context_width(encoder, config.context_width, network="UNet", source=source)
    text = cast(GlideTextModel, encoder).config
    more = config.in_channels - IMAGE_CHANNELS
    if config.channels[1] != IMAGE_CHANNELS or more not in VARIANTS:
        raise InputError(
            f"{source}: unet: got {config.in_channels} channels in and {config.out_channels} out, "
            f"expected {', '.join(str(IMAGE_CHANNELS + n) for n in VARIANTS)} in, and out those of "
            "an image, with or without a variance"
        )
    if config.class_embed_type != "identity" or config.time_width != text.projection_dim:
        raise InputError(
            f"{source}: unet: got class_embed_type {config.class_embed_type} and a time embedding "
            f"of width {config.time_width}, expected identity and {text.projection_dim}, as the "
            "text encoder's projection has"
        )
    family = VARIANTS[more]
    reads = dataclasses.replace(family.text_encoders[0], length=text.max_position_embeddings)
    return dataclasses.replace(family, text_encoders=(reads,), latent_multiple=config.size_divisor)
