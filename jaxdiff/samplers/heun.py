"""Heun's method in the ratio sigma / alpha: second order from two evaluations a step."""

import dataclasses

import jax

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.timesteps import NoiseLevel
from jaxdiff.samplers.base import NoiseFn, SamplingState, ratio_step, sigma_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun:
    """Heun's method (EDM, 2206.00364, algorithm 1).

    An Euler step to x', and the same step again along the mean of the noises at both of its ends. A
    step to a clean image stays Euler's, so that N steps are 2 N - 1 evaluations; so does one from
    pure noise, where the ratio is infinite.
    """

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """No history."""
        return ()

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """Two evaluations; one in the last step."""
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        euler = there.alpha * D + there.sigma * eps

        def corrected(guidance_state: PyTree) -> tuple[Array, PyTree]:
            (_, end), guidance_state = denoise(euler, there.as_substep_of(here), guidance_state)
            return euler + ratio_step(here, there) * (end - eps) / 2, guidance_state

        both_ends = sigma_ratio(here, there) > 0
        x, guidance_state = jax.lax.cond(
            both_ends, corrected, lambda guidance_state: (euler, guidance_state), guidance_state
        )
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)
