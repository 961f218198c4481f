"""UniPC: steps of 2M, each corrected with the evaluation that the next step needs anyway."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import full_per_image, log_snr_step


class ModelHistory(NamedTuple):
    """What is remembered besides D0, the image of the last step."""

    x: Float[Array, "b *d"]  # where the last step began, corrected
    sigma: Float[Array, "b ..."]  # its noise
    D1: Float[Array, "b *d"]  # D of the last step but one
    h: Float[Array, "b ..."]  # the last step; not yet made: infinite
    h0: Float[Array, "b ..."]  # the last step but one, likewise


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    """UniPC-2 with B(h) = exp(-h) - 1, predicting D (2302.04867, algorithms 5 and 6).

    UniP-2 is 2M. UniC-2 makes the last step again from x0, once D at its end is known. Both solve
    x = (sigma/sigma0) x0 + alpha I, I the integral of exp(-(h - u)) D(lambda0 + u) over u from 0 to
    h. UniC-2 is exact for the parabola D0 + b u + c u^2 through D1, D0 and D, whatever B is: with
    p = 1 - exp(-h), I = p D0 + (h - p) b + (h^2 - 2 (h - p)) c. Without D1 I = p (D0 + D) / 2.
    D is not evaluated again at the corrected x, and the last step is not corrected: N evaluations,
    order 3.
    """

    order = 3

    def init(self, x: Float[Array, "b *d"]) -> ModelHistory:
        """No steps yet."""
        nothing, never = jnp.zeros_like(x), full_per_image(x, jnp.inf)
        return ModelHistory(nothing, full_per_image(x, 1.0), nothing, never, never)

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation, which corrects x and predicts x'."""
        (D, _), guidance_state = denoise(state.x, here, state.guidance_state)
        past, h = state.sampler_state, log_snr_step(here, there)
        x = _correct(state.x, D, state.x0, past, here)
        # A step to a clean image (or from pure noise) has infinite h and is first-order.
        Dd = D + jnp.where(jnp.isinf(h), 0, h / (2 * past.h)) * (D - state.x0)
        predicted = (there.sigma / here.sigma) * x - there.alpha * jnp.expm1(-h) * Dd
        history = ModelHistory(x, here.sigma, state.x0, h, past.h)
        return SamplingState(
            x=predicted, x0=D, sampler_state=history, guidance_state=guidance_state
        )


def _correct(
    x: Float[Array, "b *d"],
    D: Float[Array, "b *d"],
    D0: Float[Array, "b *d"],
    past: ModelHistory,
    here: NoiseLevel,
) -> Float[Array, "b *d"]:
    """UniC-2; `x` as it is where no step of finite h led to it."""
    h, h0 = past.h, past.h0
    p = -jnp.expm1(-h)
    d, d0 = (D - D0) / h, (D0 - past.D1) / h0
    c = (d - d0) / (h + h0)
    b = d - c * h
    parabola = p * D0 + (h - p) * b + (h**2 - 2 * (h - p)) * c
    integral = jnp.where(jnp.isinf(h0), p * (D0 + D) / 2, parabola)
    corrected = (here.sigma / past.sigma) * past.x + here.alpha * integral
    return jnp.where(jnp.isinf(h), x, corrected)
