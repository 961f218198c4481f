"""Ancestral sampling whose mean is moved along a score."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.timesteps import NoiseLevel, SchedulerConvention
from jaxdiff.samplers.ddpm import DDPM
from jaxdiff.samplers.rule import Carry, Draw, decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteeredDDPM:
    """Classifier guidance (2105.05233, algorithm 1): the mean of DDPM plus its variance x score.

    `score` gives k grad log p(y | x) at the noisy image from which a step begins.
    """

    score: Callable[[Array, NoiseLevel], Array]
    of: DDPM = dataclasses.field(default_factory=DDPM)

    @property
    def convention(self) -> SchedulerConvention:
        """That of DDPM."""
        return self.of.convention

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """No history."""
        return self.of.init(x)

    def step(
        self, denoise: Denoiser, carry: Carry, here: NoiseLevel, there: NoiseLevel, draw: Draw
    ) -> Carry:
        """One evaluation, one draw, one gradient."""
        variance = jnp.square(there.sigma) * (1 - decay(here, there) ** 2)
        shift = variance * self.score(carry.x, here)
        carry = self.of.step(denoise, carry, here, there, draw)
        return carry._replace(x=carry.x + shift)
