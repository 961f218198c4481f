"""Euler's method in the ratio sigma / alpha: for the probability-flow ODE, and ancestral."""

import dataclasses

import jax.numpy as jnp

from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.churn import ChurnSampler
from jaxdiff.samplers.steps import sigma_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(ChurnSampler):
    """Euler (EDM, 2206.00364, algorithms 1 and 2 without correction).

    With r = sigma / alpha the ODE is d(x / alpha) / dr = (x / alpha - D) / r = eps. Its step
    x'/alpha' = x/alpha + (r' - r) eps has x/alpha = D + r eps in it, hence x'/alpha' = D + r' eps.
    """

    order = 1
    renoises_along_eps = True

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation; one draw with churn."""
        raised_x, raised = self.raised(state.x, here, noise_fn)
        (D, eps), guidance_state = denoise(raised_x, raised, state.guidance_state)
        x = there.alpha * D + there.sigma * eps
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerAncestral(Sampler):
    """Euler steps that go too far down and come back up with fresh noise (k-diffusion).

    Down to the ratio r'^2 / r = r' q, up by r' sqrt(1 - q^2): in ratios their squares add to r'^2.
    """

    order = 1
    stochastic = True
    renoises_along_eps = True

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation, one draw."""
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        q = sigma_ratio(here, there)
        x = there.alpha * D + there.sigma * (q * eps + jnp.sqrt(1 - q**2) * noise_fn())
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)
