"""DPM-Solver++ 2S: second order over every pair of steps, forgetting what came before it."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import full_per_image, log_snr_step


class StepStart(NamedTuple):
    """The start of the last step, and its h."""

    x: Float[Array, "b *d"]
    sigma: Float[Array, "b ..."]
    h: Float[Array, "b ..."]  # before the first step infinite, which makes that step first-order


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp2S(Sampler):
    """DPM-Solver++ 2S, midpoint form (2211.01095, algorithm 1), whose s are levels of the grid.

    Steps come in pairs. The first is of first order,
    x' = (sigma'/sigma) x - alpha' (exp(-h1) - 1) D.
    The second begins again where the first began, at the base b, with D between the ends of h =
    h0 + h1: x' = (sigma'/sigma_b) x_b - alpha' (exp(-h) - 1) Dd, Dd = D_b + (h / 2 h0) (D - D_b).
    Where h is infinite, from pure noise or to a clean image, it is of first order too.
    """

    order = 2

    def init(self, x: Float[Array, "b *d"]) -> StepStart:
        """No base yet."""
        return StepStart(jnp.zeros_like(x), full_per_image(x, 1.0), full_per_image(x, jnp.inf))

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
        base, D_b = state.sampler_state, state.x0
        h1 = log_snr_step(here, there)
        h = base.h + h1
        Dd = D_b + h / (2 * base.h) * (D - D_b)
        first = (there.sigma / here.sigma) * state.x - there.alpha * jnp.expm1(-h1) * D
        second = (there.sigma / base.sigma) * base.x - there.alpha * jnp.expm1(-h) * Dd
        is_second = per_image(here.step % 2 == 1, state.x)
        x = jnp.where(is_second & jnp.isfinite(h), second, first)
        return SamplingState(
            x=x,
            x0=D,
            sampler_state=StepStart(state.x, here.sigma, h1),
            guidance_state=guidance_state,
        )
