"""DPM-Solver++ 2M: second order from one evaluation a step and the memory of the last."""

import dataclasses

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import full_per_image, log_snr_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp2M(Sampler):
    """DPM-Solver++ 2M, midpoint form (2211.01095, algorithm 2).

    D is extrapolated with h0, the step before: Dd = D + (h / 2 h0) (D - D0), and
    x' = (sigma'/sigma) x - alpha' (exp(-h) - 1) Dd.
    """

    order = 2

    def init(self, x: Float[Array, "b *d"]) -> Float[Array, "b ..."]:
        """h0: before the first step it is infinite, which makes that step first-order."""
        return full_per_image(x, jnp.inf)

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation."""
        (D, _), guidance_state = denoise(state.x, here, state.guidance_state)
        h, h0 = log_snr_step(here, there), state.sampler_state
        # A step to a clean image (or from pure noise) has infinite h and is first-order.
        slope = jnp.where(jnp.isinf(h), 0, h / (2 * h0))
        Dd = D + slope * (D - state.x0)
        x = (there.sigma / here.sigma) * state.x - there.alpha * jnp.expm1(-h) * Dd
        return SamplingState(x=x, x0=D, sampler_state=h, guidance_state=guidance_state)
