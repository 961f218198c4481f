"""SDE-DPM-Solver++ 2M and 3M: ancestral sampling that extrapolates D from the steps before."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import full_per_image, log_snr_step

# The reverse SDE between two levels has the exact solution
#   x' = (sigma'/sigma) q x + alpha' I + sigma' sqrt(1 - q^2) z,
# I the integral of 2 exp(-2 (h - u)) D(lambda + u) over u from 0 to h. For constant D it is
# I = (1 - q^2) D, a step of DDPM; the rules here put a polynomial through the last D.


def _solution(
    x: Float[Array, "b *d"],
    integral: Float[Array, "b *d"],
    here: NoiseLevel,
    there: NoiseLevel,
    z: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """x' for I = `integral`."""
    h = log_snr_step(here, there)
    decay = there.sigma / here.sigma * jnp.exp(-h)
    return decay * x + there.alpha * integral + there.sigma * jnp.sqrt(-jnp.expm1(-2 * h)) * z


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp2MSDE(Sampler):
    """SDE-DPM-Solver++ 2M, midpoint form (2211.01095, section 5).

    With h0 the step before: I = (1 - q^2) Dd, Dd = D + (h / 2 h0) (D - D0), the line through D0 and
    D at the middle of the step.
    """

    order = 2
    stochastic = True

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
        """One evaluation, one draw."""
        (D, _), guidance_state = denoise(state.x, here, state.guidance_state)
        h, h0 = log_snr_step(here, there), state.sampler_state
        # A step to a clean image (or from pure noise) has infinite h and is first-order.
        Dd = D + jnp.where(jnp.isinf(h), 0, h / (2 * h0)) * (D - state.x0)
        x = _solution(state.x, -jnp.expm1(-2 * h) * Dd, here, there, noise_fn())
        return SamplingState(x=x, x0=D, sampler_state=h, guidance_state=guidance_state)


class ModelHistory(NamedTuple):
    """What 3M remembers besides D0; steps that were not made are infinitely long."""

    D1: Float[Array, "b *d"]  # D of the last step but one
    h0: Float[Array, "b ..."]  # the last step
    h1: Float[Array, "b ..."]  # the last step but one


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp3MSDE(Sampler):
    """SDE-DPM-Solver++ 3M: I is exact for the parabola D + b u + c u^2 through the last three D.

    With p = 1 - q^2 I = p D + (h - p / 2) b + (h^2 - h + p / 2) c; divided differences
    b0 = (D - D0) / h0 and b1 = (D0 - D1) / h1 give c = (b0 - b1) / (h0 + h1) and b = b0 + c h0.
    Derived here: k-diffusion has half of the last term and diffusers another sign in it besides.
    """

    order = 2
    stochastic = True
    rounding = 3.7e-6  # times 11/3, the sizes of its weights for short steps

    def init(self, x: Float[Array, "b *d"]) -> ModelHistory:
        """No steps yet."""
        never = full_per_image(x, jnp.inf)
        return ModelHistory(jnp.zeros_like(x), never, never)

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation, one draw."""
        (D, _), guidance_state = denoise(state.x, here, state.guidance_state)
        h, (D1, h0, h1), D0 = log_snr_step(here, there), state.sampler_state, state.x0
        b0, b1 = (D - D0) / h0, (D0 - D1) / h1
        c = (b0 - b1) / (h0 + h1)
        # After one step there is only a line, and a step of infinite h is first-order.
        b = b0 + jnp.where(jnp.isinf(h1), 0, h0) * c
        p = -jnp.expm1(-2 * h)
        bent = (h - p / 2) * b + (h**2 - h + p / 2) * c
        integral = p * D + jnp.where(jnp.isinf(h), 0, bent)
        x = _solution(state.x, integral, here, there, noise_fn())
        return SamplingState(
            x=x, x0=D, sampler_state=ModelHistory(D0, h, h0), guidance_state=guidance_state
        )
