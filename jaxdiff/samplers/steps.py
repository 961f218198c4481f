"""Quantities of a step from one noise level to the next."""

import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float
from jaxdiff.diffusion.denoising import NoiseLevel


def sigma_ratio(here: NoiseLevel, there: NoiseLevel) -> Float[Array, "b ..."]:
    """q = exp(-h) = (sigma' / alpha') / (sigma / alpha); 0 from pure noise or to a clean image."""
    return (there.sigma * here.alpha) / (here.sigma * there.alpha)


def log_snr_step(here: NoiseLevel, there: NoiseLevel) -> Float[Array, "b ..."]:
    """h = lambda' - lambda with lambda = log(alpha / sigma); infinite where `sigma_ratio` is 0."""
    return -jnp.log(sigma_ratio(here, there))


def ratio_step(here: NoiseLevel, there: NoiseLevel) -> Float[Array, "b ..."]:
    """alpha' (r' - r) with r = sigma / alpha, what a unit more of noise along a step adds to x'.

    0 from pure noise, where it would be infinite.
    """
    step = there.sigma - there.alpha * here.sigma / here.alpha
    return jnp.where(here.alpha > 0, step, 0)


def is_finite_step(here: NoiseLevel, there: NoiseLevel) -> Bool[Array, "b"]:
    """Where h is finite: neither from pure noise nor to a clean image, and not at rest."""
    return (sigma_ratio(here, there) > 0).reshape(-1) & here.active


def full_per_image(x: Float[Array, "b *d"], value: float) -> Float[Array, "b ..."]:
    """`value` for each image, in a shape that multiplies x."""
    return jnp.full((len(x),) + (1,) * (x.ndim - 1), value, x.dtype)
