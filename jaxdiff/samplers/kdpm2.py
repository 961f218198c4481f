"""DPM-Solver-2 in the ratio sigma / alpha, as k-diffusion has it: the ODE, and ancestral."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, PyTree
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image, select
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import is_finite_step, ratio_step, sigma_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDPM2(Sampler):
    """DPM-Solver-2 (2206.00927, algorithm 1) with EDM's ratio (2206.00364, section C.2).

    With r = sigma / alpha: an Euler step to m = sqrt(r r'), the middle of log r, where the noise is
    e_m = eps + (D - D_m) / m, and the whole step x'/alpha' = x/alpha + (r' - r) e_m. A step from
    pure noise or to a clean image is Euler's.
    """

    order = 2
    internal = ("schedule",)

    schedule: Schedule | None = None  # that of the network, set by `for_schedule`

    def for_schedule(self, schedule: Schedule) -> Sampler:
        """The sampler that can ask `schedule` for the time of the level in the middle."""
        return dataclasses.replace(self, schedule=schedule)

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
        """Two evaluations, one in the last step."""
        del noise_fn
        return self._solve(denoise, state, here, there)

    def _solve(
        self, denoise: Denoiser, state: SamplingState, here: NoiseLevel, there: NoiseLevel
    ) -> SamplingState:
        """The step of the ODE."""
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        euler = there.alpha * D + there.sigma * eps
        finite = is_finite_step(here, there)
        first_order = euler, guidance_state

        def second_order() -> tuple[Array, PyTree]:
            middle = self._middle(here, there)._replace(active=finite)
            at_middle = middle.alpha * D + middle.sigma * eps
            (D_m, _), memory = denoise(at_middle, middle, guidance_state)
            # written with images: steps from r = 4096 would multiply the rounding of e_m - eps
            change = ratio_step(here, there) * middle.alpha / middle.sigma
            return select(finite, (euler + change * (D - D_m), memory), first_order)

        x, guidance_state = jax.lax.cond(jnp.any(finite), second_order, lambda: first_order)
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)

    def _middle(self, here: NoiseLevel, there: NoiseLevel) -> NoiseLevel:
        """The level in the middle of log r; any where that is infinite."""
        if self.schedule is None:
            raise InputError(
                "sampler: got KDPM2 without a schedule, "
                "expected the sampler's for_schedule(schedule)"
            )
        q = sigma_ratio(here, there)
        r = here.sigma / jnp.where(here.alpha > 0, here.alpha, 1) * jnp.sqrt(q)
        t, alpha, sigma = self.schedule.level_of(jnp.where(q > 0, r, 1).reshape(-1))
        alpha, sigma = (per_image(a.astype(r.dtype), r) for a in (alpha, sigma))
        return here._replace(t=t.astype(here.t.dtype), alpha=alpha, sigma=sigma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDPM2Ancestral(KDPM2):
    """Steps of KDPM2 that go too far down and come back up with fresh noise (k-diffusion).

    Down to r'^2 / r = r' q, up by r' sqrt(1 - q^2), as `EulerAncestral`. In the middle of the way
    down is r', though at the time that the schedule has for it, which on a grid of rounded or
    interpolated times is another.
    """

    rounding = 3e-6  # times 3: one draw, and two evaluations, the second at what the first made
    stochastic = True

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """Two evaluations, one in the last step; one draw."""
        q = sigma_ratio(here, there)
        low = self._solve(denoise, state, here, there._replace(sigma=there.sigma * q))
        return low._replace(x=low.x + there.sigma * jnp.sqrt(1 - q**2) * noise_fn())
