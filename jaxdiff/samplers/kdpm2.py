"""DPM-Solver-2 in the ratio sigma / alpha, as k-diffusion has it: the ODE, and ancestral."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, PyTree
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image, select
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.samplers.base import (
    NoiseFn,
    Sampler,
    SamplingState,
    is_finite_step,
    ratio_step,
    sigma_ratio,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KDPM2(Sampler):
    """DPM-Solver-2 (2206.00927, algorithm 1) with EDM's ratio (2206.00364, section C.2).

    With r = sigma / alpha: an Euler step to the ratio sqrt(r r_d) in the middle of log r, and the
    whole step x/alpha + (r_d - r) e along the noise e that is found there. The ODE's r_d is r'. A
    step from pure noise or to a clean image is Euler's.
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
        return _dpm_solver_2(denoise, state, here, there, self._middle(here, there))

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
class KDPM2Ancestral(Sampler):
    """Steps of KDPM2 that go too far down and come back up with fresh noise (k-diffusion).

    Down to r_d = r'^2 / r = r' q, up by r' sqrt(1 - q^2), as `EulerAncestral`. In the middle of
    log r and log r_d is r'.
    """

    order = 2
    rounding = 3e-6  # times 3: one draw, and two evaluations, the second at what the first made
    stochastic = True
    renoises_along_eps = True

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
        """Two evaluations, one in the last step; one draw."""
        q = sigma_ratio(here, there)
        low = _dpm_solver_2(denoise, state, here, there._replace(sigma=there.sigma * q), there)
        return low._replace(x=low.x + there.sigma * jnp.sqrt(1 - q**2) * noise_fn())


def _dpm_solver_2(
    denoise: Denoiser, state: SamplingState, here: NoiseLevel, down: NoiseLevel, middle: NoiseLevel
) -> SamplingState:
    """The step to `down` along the noise at `middle`; of first order where it is infinite."""
    (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
    euler = down.alpha * D + down.sigma * eps
    finite = is_finite_step(here, down)
    first_order = euler, guidance_state

    def second_order() -> tuple[Array, PyTree]:
        level = middle.as_substep_of(here, finite)
        at = level.alpha * D + level.sigma * eps
        (_, noise), memory = denoise(at, level, guidance_state)
        x = euler + ratio_step(here, down) * (noise - eps)
        return select(finite, (x, memory), first_order)

    x, guidance_state = jax.lax.cond(jnp.any(finite), second_order, lambda: first_order)
    return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)
