"""DEIS: second order from one evaluation a step, with a line through the noises in log sigma."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import full_per_image, log_snr_step, ratio_step

FEW_STEPS = 15  # with fewer the last step is of first order


class NoiseHistory(NamedTuple):
    """The last noise, and the h of the step that began there."""

    eps: Float[Array, "b *d"]
    h: Float[Array, "b ..."]  # before the first step infinite, which makes that step first-order


@dataclasses.dataclass(frozen=True, kw_only=True)
class DEIS(Sampler):
    """DEIS of second order (2204.13902, tAB-DEIS), whose polynomial is one in log rho.

    With rho = sigma / alpha x'/alpha' = x/alpha + the integral of eps over rho, with the line
    through eps0 and eps in log rho:
    x' = alpha' D + sigma' eps + alpha' (rho' - rho + rho' h) / h0 (eps - eps0), h0 the step before.
    As in diffusers the last one of fewer than 15 steps is of first order.
    """

    order = 2

    def init(self, x: Float[Array, "b *d"]) -> NoiseHistory:
        """No noise yet."""
        return NoiseHistory(jnp.zeros_like(x), full_per_image(x, jnp.inf))

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation."""
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        past, h = state.sampler_state, log_snr_step(here, there)
        last = (here.step == here.num_steps - 1) & (here.num_steps < FEW_STEPS)
        # A step to a clean image (or from pure noise) has infinite h.
        plain = jnp.isinf(h) | per_image(last, h)
        bend = jnp.where(plain, 0, ratio_step(here, there) + there.sigma * h) / past.h
        x = there.alpha * D + there.sigma * eps + bend * (eps - past.eps)
        history = NoiseHistory(eps, h)
        return SamplingState(x=x, x0=D, sampler_state=history, guidance_state=guidance_state)
