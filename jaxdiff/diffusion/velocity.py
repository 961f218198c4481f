"""Velocities and scores of what a network predicts, on any Gaussian path, and back.

A path is x = alpha x0 + sigma eps with time derivatives alpha' and sigma'; `Schedule.derivatives`
gives them.
"""

from typing import Any, TypeVar, cast

from jaxdiff.core.types import Array, Float
from jaxdiff.diffusion.denoising import PerImage, Prediction, per_image

T = TypeVar("T")


def to_score(prediction: Prediction, sigma: PerImage) -> Float[Array, "b *d"]:
    """grad log p(x) = -eps / sigma of the noisy images; `predict("score", ...)` is the way back."""
    return -prediction.eps / per_image(sigma, prediction.eps)


def to_velocity(
    prediction: Prediction, d_alpha: PerImage, d_sigma: PerImage
) -> Float[Array, "b *d"]:
    """The velocity dx/dt = alpha' x0 + sigma' eps of a path, of time derivatives (alpha', sigma').

    Where x = (1 - s) x0 + s eps that is by s what a network of `flow_prediction` outputs.
    """
    x0, eps = prediction
    return per_image(d_alpha, x0) * x0 + per_image(d_sigma, eps) * eps


def from_velocity(
    velocity: Float[Array, "b *d"],
    x: Float[Array, "b *d"],
    alpha: PerImage,
    sigma: PerImage,
    d_alpha: PerImage,
    d_sigma: PerImage,
) -> Prediction:
    """The image and the noise whose path through x has this velocity: the way back.

    Undefined where sigma / alpha does not change, alpha sigma' = alpha' sigma.
    """
    a, s, da, ds = (per_image(value, x) for value in (alpha, sigma, d_alpha, d_sigma))
    wronskian = a * ds - da * s
    return Prediction((ds * x - s * velocity) / wronskian, (a * velocity - da * x) / wronskian)


def velocity_coefficients(alpha: T, sigma: T, d_alpha: T, d_sigma: T) -> tuple[T, T]:
    """(a, b) of a path: its velocity is a x + b score (SiT, 2401.08740).

    a = alpha' / alpha and b = sigma (alpha' sigma - sigma' alpha) / alpha; both end at pure noise.
    """
    a, s, da, ds = (cast(Any, value) for value in (alpha, sigma, d_alpha, d_sigma))
    return da / a, s * (da * s - ds * a) / a
