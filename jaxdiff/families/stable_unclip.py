"""Stable unCLIP: Stable Diffusion 2.1 that reads the embedding of an image beside the text.

After unCLIP (2204.06125). Noise is added to CLIP's embedding of an image, and the network gets it
with the step of the noise in place of a class. The image is a given one, or what a prior generates
of the text.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, Int, NDArray
from jaxdiff.core.validate import in_range
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.families.base import Family
from jaxdiff.families.components import (
    check_context_width,
    check_latent_channels,
    required_component,
)
from jaxdiff.families.extras import ExtraInputs, Option
from jaxdiff.families.image_prompts import ImagePrompt
from jaxdiff.families.low_resolution import NoisedImage, noising_schedule
from jaxdiff.families.unclip_prior import check_prior, unclip_prior
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.unclip import StableUnCLIPImageNormalizer
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.nn.embeddings import sinusoidal

VARIATIONS = "StableUnCLIPImg2ImgPipeline"
# Of the two models in a folder of StableUnCLIPPipeline; diffusers has no such classes.
PRIOR_CLASS, DECODER_CLASS = "StableUnCLIPPriorPipeline", "StableUnCLIPDecoderPipeline"
PIPELINE_CLASSES = (VARIATIONS, PRIOR_CLASS, DECODER_CLASS)
NORMALISER = "image_normalizer"
NOISING_SCHEDULER = "image_noising_scheduler"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyImageEmbedding(NoisedImage, ImagePrompt):
    """The embedding of an image with noise, and beside it that of the step of its noise.

    Between the mean and the deviation of `normaliser`, embeddings are noised by `schedule`. Streams
    without prompts get zeros.
    """

    normaliser: StableUnCLIPImageNormalizer | None = dataclasses.field(compare=False, repr=False)
    noise_level: int = 0

    argument = "class_labels"
    options: ClassVar[Mapping[str, Option]] = {**NoisedImage.options, **ImagePrompt.options}

    def check(self, settings: Mapping[str, Any], texts: Sequence[str]) -> None:
        """InputError for no embedding, and for a level beyond the schedule."""
        super().check(settings, texts)
        if (level := settings.get("noise_level")) is not None:
            in_range("noise_level", level, 0, self.highest)

    def of_request(self, inputs: ExtraInputs) -> Float[NDArray, "b k d2"]:
        embeddings = self.embeddings(inputs)
        noise = inputs.noise(embeddings.shape[1:])
        labels = self.noisy(embeddings, noise, self.levels(inputs.options))
        return self.for_prompted(labels, np.zeros(labels.shape[1:], np.float32), inputs.prompted)

    def noisy(
        self,
        embeddings: Float[NDArray, "b d"],
        noise: Float[NDArray, "b d"],
        levels: Int[NDArray, "b"],
    ) -> Float[NDArray, "b d2"]:
        """Embeddings with `noise` of unit variance at these steps, and the steps' embeddings."""
        module = cast(StableUnCLIPImageNormalizer, self.normaliser)
        mean, std = (np.asarray(each[...], np.float32) for each in (module.mean, module.std))
        alpha, sigma = (np.asarray(x)[:, None] for x in self.schedule.alpha_sigma(levels))
        normed = alpha * (embeddings - mean) / std + sigma * noise
        steps = np.asarray(sinusoidal(jnp.asarray(levels), self.width))
        return np.concatenate([normed * std + mean, steps], axis=-1).astype(np.float32)


_EXTRA = NoisyImageEmbedding(
    normaliser=None,
    width=1024,
    schedule=VPSchedule(beta_schedule="squaredcos_cap_v2"),
    highest=999,
)
STABLE_UNCLIP = Family(
    name="Stable unCLIP",
    network="unet",
    network_class=UNet2DConditionModel,
    adapter=UNetAdapter,
    extras=(_EXTRA,),
    defaults={"guidance_scale": 10.0, "steps": 20},
)
PRIOR = unclip_prior("Stable unCLIP prior", prefix="prior_")
FAMILIES = (STABLE_UNCLIP, PRIOR)


def detect(
    components: Mapping[str, nnx.Module], options: Mapping[str, Any], *, source: str
) -> Family:
    """The family of `components`; InputError, from `source`, if they do not fit together.

    `options` has the config of NOISING_SCHEDULER, but for a prior.
    """
    if options["_class_name"] == PRIOR_CLASS:
        check_prior(PRIOR, components, source)
        return PRIOR
    unet = required_component(components, "unet", UNet2DConditionModel, source)
    vae = cast(AutoencoderKL, required_component(components, "vae", AutoencoderKL, source))
    text = required_component(components, "text_encoder", CLIPTextModel, source)
    module = required_component(components, NORMALISER, StableUnCLIPImageNormalizer, source)
    config = cast(UNet2DConditionModel, unet).config
    check_context_width(text, config.context_width, network="UNet", source=source)
    channels = vae.config.latent_channels
    check_latent_channels(config.in_channels, channels, name="unet", source=source)
    normaliser = cast(StableUnCLIPImageNormalizer, module)
    width = normaliser.config.embedding_dim
    labels = config.projection_class_embeddings_input_dim
    if config.class_embed_type != "projection" or labels != 2 * width:
        raise InputError(
            f"{source}: unet: got class_embed_type {config.class_embed_type} of width {labels}, "
            f"expected projection of {2 * width}, an embedding of an image and one of its noise"
        )
    varies = options["_class_name"] == VARIATIONS
    if varies:
        encoder = required_component(components, "image_encoder", CLIPVisionModel, source)
        got = cast(CLIPVisionModel, encoder).config.projection_dim
        if got != width:
            raise InputError(
                f"{source}: image_encoder: got projection_dim {got}, expected {width}, as the "
                f"{NORMALISER} has"
            )
    schedule = noising_schedule(options, NOISING_SCHEDULER, source)
    extra = dataclasses.replace(
        _EXTRA,
        normaliser=normaliser,
        width=width,
        schedule=schedule,
        highest=schedule.num_train_timesteps - 1,
        reads_image_prompt=varies,
    )
    return dataclasses.replace(STABLE_UNCLIP, extras=(extra,))
