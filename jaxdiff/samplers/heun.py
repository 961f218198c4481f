"""Heun's method in the ratio sigma / alpha: second order from two evaluations a step."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, PyTree
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, select
from jaxdiff.samplers.base import NoiseFn, SamplingState
from jaxdiff.samplers.churn import ChurnSampler
from jaxdiff.samplers.steps import is_finite_step, ratio_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(ChurnSampler):
    """Heun's method (EDM, 2206.00364, algorithms 1 and 2).

    An Euler step to x', and the same step again along the mean of the noises at both of its ends. A
    step to a clean image stays Euler's, so that N steps are 2 N - 1 evaluations; so does one from
    pure noise, where the ratio is infinite.
    """

    order = 2

    def nfe(
        self, steps: int, *, ends_clean: bool = True, restarts: Sequence[int] = ()
    ) -> list[int]:
        """Two in each step but one to a clean image."""
        del restarts
        return [2] * (steps - ends_clean) + [1] * ends_clean

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """Two evaluations, one in the last step; one draw with churn."""
        raised_x, raised = self.raised(state.x, here, noise_fn)
        (D, eps), guidance_state = denoise(raised_x, raised, state.guidance_state)
        euler = there.alpha * D + there.sigma * eps

        both_ends = is_finite_step(here, there)
        one_end = euler, guidance_state

        def corrected() -> tuple[Array, PyTree]:
            level = there.as_substep_of(here, both_ends)
            (_, end), both = denoise(euler, level, guidance_state)
            x = euler + ratio_step(raised, there) * (end - eps) / 2
            return select(both_ends, (x, both), one_end)

        x, guidance_state = jax.lax.cond(jnp.any(both_ends), corrected, lambda: one_end)
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)
