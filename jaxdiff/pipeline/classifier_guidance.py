"""Guidance by a classifier of noisy latents, and by CLIP."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image
from jaxdiff.guidance.classifier_guidance import (
    LogProb,
    classifier_guidance,
    log_prob_gradient,
    loss_guidance,
    spherical,
)
from jaxdiff.models.classifier import LatentClassifier
from jaxdiff.models.clip import CLIPModel
from jaxdiff.models.image_processor import CLIPImageProcessor
from jaxdiff.models.latent_codec import LatentCodec
from jaxdiff.samplers.base import Sampler


class ClassifierTarget(NamedTuple):
    """Labels of a classifier that each image shall have, and how strongly."""

    scale: Float[Array, "b"]
    targets: Bool[Array, "b n"]
    known: Bool[Array, "b n"]  # those of which anything is wanted


class CLIPTarget(NamedTuple):
    """Texts that CLIP shall see in each image, and how strongly."""

    scale: Float[Array, "b"]
    text: Float[Array, "b p"]  # unit vectors


class GuidanceTargets(NamedTuple):
    """The targets of classifier and CLIP guidance; None: no such guidance."""

    classifier: ClassifierTarget | None = None
    clip: CLIPTarget | None = None


def with_models(
    denoise: Denoiser,
    sampler: Sampler,
    targets: GuidanceTargets,
    image_processor: CLIPImageProcessor | None = None,
    *,
    classifier: LatentClassifier | None = None,
    clip: CLIPModel | None = None,
    codec: LatentCodec | None = None,
) -> tuple[Denoiser, Sampler]:
    """Denoiser and sampler that also follow the classifier and CLIP to their `targets`."""
    terms = []
    if targets.clip is not None and clip is not None and image_processor is not None:
        if clip.vision_model.config.noise_steps is not None:
            log_prob = noisy_clip_log_prob(targets.clip, clip, image_processor)
            terms.append((log_prob, targets.clip.scale))
        elif codec is not None:
            denoise = with_clip_guidance(denoise, targets.clip, clip, image_processor, codec)
    if targets.classifier is not None and classifier is not None:
        log_prob = classifier_log_prob(targets.classifier, classifier)
        terms.append((log_prob, targets.classifier.scale))
    return with_gradients(denoise, sampler, terms)


def with_clip_guidance(
    denoise: Denoiser,
    wanted: CLIPTarget,
    clip: CLIPModel,
    image_processor: CLIPImageProcessor,
    codec: LatentCodec,
) -> Denoiser:
    """The denoiser, guided to reduce CLIP's distance of the decoded image to the text."""

    def loss(D: Float[Array, "b h w c"]) -> Float[Array, "b"]:
        images = codec.decode(codec.unscale(D)).astype(jnp.float32)
        return spherical(clip.image_embeds(image_processor(images)), wanted.text)

    return loss_guidance(denoise, loss, wanted.scale)


def classifier_log_prob(wanted: ClassifierTarget, classifier: LatentClassifier) -> LogProb:
    """The log-probability of the labels that are known."""

    def log_prob(x: Float[Array, "b h w c"], level: NoiseLevel) -> Float[Array, "b"]:
        logits = classifier(x, jnp.broadcast_to(level.t, (len(x),)))
        return classifier.config.attributes.log_prob(logits, wanted.targets, wanted.known)

    return log_prob


def noisy_clip_log_prob(
    wanted: CLIPTarget, clip: CLIPModel, image_processor: CLIPImageProcessor
) -> LogProb:
    """The logit of the text, as a CLIP of noisy images sees it (GLIDE, 2112.10741, section 3.2)."""

    def log_prob(x: Float[Array, "b h w c"], level: NoiseLevel) -> Float[Array, "b"]:
        t = jnp.round(jnp.broadcast_to(level.t, (len(x),))).astype(jnp.int32)
        image = clip.image_embeds(image_processor(x.astype(jnp.float32)), t)
        return jnp.exp(clip.logit_scale[...]) * jnp.sum(image * wanted.text, axis=-1)

    return log_prob


def with_gradients(
    denoise: Denoiser, sampler: Sampler, terms: Sequence[tuple[LogProb, Float[Array, "b"]]]
) -> tuple[Denoiser, Sampler]:
    """Denoiser and sampler with the gradients of log-probabilities, each times its scale.

    They move the mean of a sampler that takes a score, and the noise that all others see.
    """

    def score(x: Float[Array, "b h w c"], level: NoiseLevel) -> Float[Array, "b h w c"]:
        return sum(
            (
                per_image(scale, x) * log_prob_gradient(log_prob, x, level)
                for log_prob, scale in terms
            ),
            start=jnp.zeros_like(x),
        )

    if not terms:
        return denoise, sampler
    moved = sampler.with_score(score)
    if moved is not None:
        return denoise, moved
    for log_prob, scale in terms:
        denoise = classifier_guidance(denoise, log_prob, scale)
    return denoise, sampler
