"""PNDM as Stable Diffusion uses it: DDIM's step along a mean of the last four noises."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Int, PyTree
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image, select
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState, is_finite_step, ratio_step

# Adams-Bashforth: the weights of eps and of the three before it, by how many of them there are.
_WEIGHTS = (
    (1, 0, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class ModelHistory(NamedTuple):
    """The noises of the three steps before, the last one first, and how many steps there were."""

    noises: tuple[Float[Array, "b *d"], Float[Array, "b *d"], Float[Array, "b *d"]]
    num_steps: Int[Array, "b"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNDM(Sampler):
    """PLMS (2202.09778, eq. 9 and 12), begun by an improved Euler step instead of Runge-Kutta.

    With r = sigma / alpha DDIM's step is x'/alpha' = x/alpha + (r' - r) eps; here a mean of noises
    takes the place of eps. In the first step it is that of eps and of eps at x', one evaluation
    more, unless the step begins from pure noise or ends at a clean image. The weights are those of
    equal steps in r: where these change smoothly the order is 2, where they are equal it is the 3
    of the first two steps.
    """

    order = 2
    rounding = 6.7e-6  # times 20/3, the sizes of four weights

    def nfe(
        self, steps: int, *, ends_clean: bool = True, restarts: Sequence[int] = ()
    ) -> list[int]:
        """Two in a step without history."""
        del ends_clean
        return [2 if i in {0, *restarts} else 1 for i in range(steps)]

    def init(self, x: Float[Array, "b *d"]) -> ModelHistory:
        """No noises yet."""
        nothing = jnp.zeros_like(x)
        return ModelHistory((nothing, nothing, nothing), jnp.zeros(len(x), jnp.int32))

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation; two in the first step."""
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        noises, steps = state.sampler_state
        weights = jnp.asarray(_WEIGHTS, eps.dtype)[jnp.minimum(steps, 3)]
        mean = per_image(weights[:, 0], eps) * eps
        for i, noise in enumerate(noises, 1):
            mean = mean + per_image(weights[:, i], eps) * noise

        def along(noise: Array) -> Array:
            straight = there.alpha * D + there.sigma * eps
            return straight + ratio_step(here, there) * (noise - eps)

        first = (steps == 0) & is_finite_step(here, there)
        plain = along(mean), guidance_state

        def improved() -> tuple[Array, PyTree]:
            level = there.as_substep_of(here, first)
            (_, end), improved_state = denoise(along(eps), level, guidance_state)
            return select(first, (along((eps + end) / 2), improved_state), plain)

        x, guidance_state = jax.lax.cond(jnp.any(first), improved, lambda: plain)
        return SamplingState(
            x=x,
            x0=D,
            sampler_state=ModelHistory((eps, *noises[:2]), steps + 1),
            guidance_state=guidance_state,
        )
