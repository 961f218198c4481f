"""PNDM as Stable Diffusion uses it: DDIM's step along a mean of the last four noises."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, Int, PyTree
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image, select
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import is_finite_step, ratio_step

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
    """PNDM (2202.09778, eq. 9, 12 and 13): Adams-Bashforth, by default begun as PLMS.

    With r = sigma / alpha DDIM's step is x'/alpha' = x/alpha + (r' - r) eps; here a mean of noises
    takes the place of eps. In the first step of PLMS it is that of eps and of eps at x', one
    evaluation more. Without `skip_prk_steps` the first three steps are the paper's: the mean of
    Runge-Kutta's four noises, two of them at the time in the middle. Such steps are plain where
    they begin from pure noise or end at a clean image, and so is the last one of a grid. The
    weights are those of equal steps in r: where these change smoothly the order is 2, where they
    are equal it is the 3 of the first two steps of PLMS, or the 4 of Runge-Kutta.
    """

    order = 2
    rounding = 6.7e-6  # times 20/3, the sizes of four weights
    internal = ("schedule",)

    skip_prk_steps: bool = True
    schedule: Schedule | None = None  # that of the network, set by `for_schedule`

    def for_schedule(self, schedule: Schedule) -> Sampler:
        """The sampler that can ask `schedule` for the level in the middle of a step."""
        return self if self.skip_prk_steps else dataclasses.replace(self, schedule=schedule)

    def nfe(
        self, steps: int, *, ends_clean: bool = True, restarts: Sequence[int] = ()
    ) -> list[int]:
        """Two in a step without history, or four in the first three; one in the last."""
        starts, length, calls = {0, *restarts}, *((1, 2) if self.skip_prk_steps else (3, 4))
        begins = {i + k for i in starts for k in range(length)} - {steps - 1 if ends_clean else -1}
        return [calls if i in begins else 1 for i in range(steps)]

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
        """One evaluation; two or four in the first steps."""
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        noises, steps = state.sampler_state
        weights = jnp.asarray(_WEIGHTS, eps.dtype)[jnp.minimum(steps, 3)]
        mean = per_image(weights[:, 0], eps) * eps
        for i, noise in enumerate(noises, 1):
            mean = mean + per_image(weights[:, i], eps) * noise

        def along(noise: Array, end: NoiseLevel = there) -> Array:
            straight = end.alpha * D + end.sigma * eps
            return straight + ratio_step(here, end) * (noise - eps)

        begins = steps < (1 if self.skip_prk_steps else 3)
        begins = begins & is_finite_step(here, there) & (here.step < here.num_steps - 1)
        plain = along(mean), guidance_state
        next_level = there.as_substep_of(here, begins)

        def improved_euler() -> tuple[Array, PyTree]:
            (_, end), improved_state = denoise(along(eps), next_level, guidance_state)
            return select(begins, (along((eps + end) / 2), improved_state), plain)

        def runge_kutta() -> tuple[Array, PyTree]:
            middle = self._middle(here, there).as_substep_of(here, begins)
            (_, e2), memory = denoise(along(eps, middle), middle, guidance_state)
            (_, e3), memory = denoise(along(e2, middle), middle, memory)
            (_, e4), memory = denoise(along(e3), next_level, memory)
            return select(begins, (along((eps + 2 * e2 + 2 * e3 + e4) / 6), memory), plain)

        beginning = improved_euler if self.skip_prk_steps else runge_kutta
        x, guidance_state = jax.lax.cond(jnp.any(begins), beginning, lambda: plain)
        return SamplingState(
            x=x,
            x0=D,
            sampler_state=ModelHistory((eps, *noises[:2]), steps + 1),
            guidance_state=guidance_state,
        )

    def _middle(self, here: NoiseLevel, there: NoiseLevel) -> NoiseLevel:
        """The level at the time in the middle; between two discrete ones the lower."""
        if self.schedule is None:
            raise InputError(
                "skip_prk_steps: got False without a schedule, "
                "expected the sampler's for_schedule(schedule)"
            )
        t = (here.t + there.t) / 2
        if self.schedule.num_discrete is not None:
            t = jnp.floor(t)
        alpha, sigma = (per_image(a, here.alpha) for a in self.schedule.alpha_sigma(t))
        return here._replace(t=t, alpha=alpha, sigma=sigma)
