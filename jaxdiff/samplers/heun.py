"""Heun's method in the ratio sigma / alpha: second order from two evaluations a step."""

import dataclasses

import jax

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.timesteps import NoiseLevel, SchedulerConvention
from jaxdiff.samplers.euler import CONVENTION
from jaxdiff.samplers.rule import Carry, Draw, decay, ratio_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun:
    """Heun's method (EDM, 2206.00364, algorithm 1).

    An Euler step to x', and the same step again along the mean of the noises at both of its ends. A
    step to a clean image stays Euler's, so that N steps are 2 N - 1 evaluations; so does one from
    pure noise, where the ratio is infinite.
    """

    convention: SchedulerConvention = dataclasses.field(
        default=dataclasses.replace(CONVENTION, final_sigma="zero"), init=False
    )

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """No history."""
        return ()

    def step(
        self, denoise: Denoiser, carry: Carry, here: NoiseLevel, there: NoiseLevel, draw: Draw
    ) -> Carry:
        """Two evaluations; one in the last step."""
        (D, eps), memory = denoise(carry.x, here, carry.memory)
        euler = there.alpha * D + there.sigma * eps

        def corrected(memory: PyTree) -> tuple[Array, PyTree]:
            (_, end), memory = denoise(euler, there.as_substep_of(here), memory)
            return euler + ratio_step(here, there) * (end - eps) / 2, memory

        both_ends = decay(here, there) > 0
        x, memory = jax.lax.cond(both_ends, corrected, lambda memory: (euler, memory), memory)
        return Carry(x=x, x0=D, history=(), memory=memory)
