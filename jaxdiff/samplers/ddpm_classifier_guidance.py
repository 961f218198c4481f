"""Classifier guidance of ancestral sampling."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState, sigma_ratio
from jaxdiff.samplers.ddpm import DDPM


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierGuidedDDPM(Sampler):
    """Classifier guidance (2105.05233, algorithm 1): the mean of DDPM plus its variance x score.

    `score` gives k grad log p(y | x) at the noisy image from which a step begins.
    """

    score: Callable[[Array, NoiseLevel], Array]
    inner: DDPM = dataclasses.field(default_factory=DDPM)

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """No history."""
        return self.inner.init(x)

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation, one draw, one gradient."""
        variance = jnp.square(there.sigma) * (1 - sigma_ratio(here, there) ** 2)
        shift = variance * self.score(state.x, here)
        state = self.inner.step(denoise, state, here, there, noise_fn)
        return state._replace(x=state.x + shift)
