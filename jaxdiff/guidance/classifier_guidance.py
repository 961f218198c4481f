"""Classifier and loss guidance: a denoiser moved along a gradient by the noisy image.

This adds to whatever guidance the denoiser has. In all forms k is the scale of an image, and k = 0
leaves the denoiser as it is.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, Prediction, per_image

# (x, level) -> log p(y | x) of each image, by a classifier of noisy images
LogProb = Callable[[Float[Array, "b *d"], NoiseLevel], Float[Array, "b"]]
# denoised images -> loss of each
Loss = Callable[[Float[Array, "b *d"]], Float[Array, "b"]]


def log_prob_gradient(
    log_prob: LogProb, x: Float[Array, "b *d"], level: NoiseLevel
) -> Float[Array, "b *d"]:
    """The gradient of log p(y | x) by x, image by image."""
    return jax.grad(lambda x: jnp.sum(log_prob(x, level)))(x)


def classifier_guidance(denoise: Denoiser, log_prob: LogProb, k: Float[Array, "b"]) -> Denoiser:
    """Classifier guidance (2105.05233, algorithm 2): eps - k sigma grad log p(y | x).

    The form for deterministic samplers; `samplers.ddpm` has the one for ancestral sampling.
    """

    def guided(
        x: Float[Array, "b *d"], level: NoiseLevel, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        prediction, state = denoise(x, level, state)
        return shift_x0(prediction, level, k, log_prob_gradient(log_prob, x, level)), state

    return guided


def loss_guidance(denoise: Denoiser, loss: Loss, k: Float[Array, "b"]) -> Denoiser:
    """Guidance by a loss of the denoised image: eps + k sigma grad loss(D(x)).

    The gradient goes through the denoiser, so a step costs about three evaluations and the loss.
    """

    def guided(
        x: Float[Array, "b *d"], level: NoiseLevel, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        def total(x: Float[Array, "b *d"]) -> tuple[Array, tuple[Prediction, PyTree]]:
            prediction, new = denoise(x, level, state)
            return jnp.sum(loss(prediction.x0)), (prediction, new)

        gradient, (prediction, new) = jax.grad(total, has_aux=True)(x)
        return shift_x0(prediction, level, k, -gradient), new

    return guided


def shift_x0(
    prediction: Prediction, level: NoiseLevel, k: Float[Array, "b"], score: Float[Array, "b *d"]
) -> Prediction:
    """The prediction with k times `score` added to the score -eps / sigma of the noisy image.

    D moves by sigma^2 / alpha times it; from pure noise, where alpha = 0, nothing moves.
    """
    step = per_image(k, score) * score
    some = level.alpha > 0
    rate = jnp.where(some, level.sigma**2 / jnp.where(some, level.alpha, 1), 0)
    eps = prediction.eps - jnp.where(some, level.sigma, 0) * step
    return dataclasses.replace(prediction, x0=prediction.x0 + rate * step, eps=eps)


def spherical(a: Float[Array, "b p"], b: Float[Array, "b p"]) -> Float[Array, "b"]:
    """2 arcsin(|a - b| / 2)^2 of unit vectors: half the square of the angle between them."""
    chord = jnp.sum(jnp.square(a - b), axis=-1)
    near = chord < 1e-6  # there arcsin(u) is u, and the root has no gradient at 0
    half = jnp.sqrt(jnp.where(near, 1.0, chord)) / 2
    return jnp.where(near, chord / 2, 2 * jnp.square(jnp.arcsin(jnp.minimum(half, 1 - 1e-6))))
