"""Churn: samplers of the ODE that add noise before each step, and remove it with the step."""

import dataclasses
import math

import jax.numpy as jnp

from jaxdiff.core.configs import Need, check_needs
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import in_range
from jaxdiff.diffusion.denoising import NoiseLevel, per_image, select
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.samplers.base import NoiseFn, Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChurnSampler(Sampler):
    """The stochastic sampler of EDM (2206.00364, algorithm 2, lines 4 to 6), before the ODE's step.

    With r = sigma / alpha, N steps and gamma = min(s_churn / N, sqrt(2) - 1) where s_tmin <= r <=
    s_tmax, else 0: x rises from r to r^ = (1 + gamma) r, x^/alpha^ = x/alpha + sqrt(r^2^ - r^2)
    s_noise z, and the step goes from there. Pure noise has nothing above it.
    """

    stochastic_options = ("s_churn",)
    internal = ("schedule",)

    s_churn: float = 0.0  # 0: deterministic
    s_tmin: float = 0.0  # ratios sigma / alpha
    s_tmax: float = math.inf
    s_noise: float = 1.0  # above 1 it makes up for a network that removes too much noise
    schedule: Schedule | None = None  # that of the network, set by `for_schedule`

    def __post_init__(self) -> None:
        in_range("s_churn", self.s_churn, 0, 1e6)
        in_range("s_tmin", self.s_tmin, 0, math.inf)
        in_range("s_tmax", self.s_tmax, self.s_tmin, math.inf)
        in_range("s_noise", self.s_noise, 0, 10)
        check_needs(self, dict.fromkeys(("s_tmin", "s_tmax", "s_noise"), Need("s_churn")))

    def for_schedule(self, schedule: Schedule) -> Sampler:
        """The sampler that can ask `schedule` for the time of a raised level."""
        return dataclasses.replace(self, schedule=schedule) if self.s_churn else self

    def raised(
        self, x: Float[Array, "b *d"], here: NoiseLevel, noise_fn: NoiseFn
    ) -> tuple[Float[Array, "b *d"], NoiseLevel]:
        """x^ and its level; x and `here` as they are without churn."""
        if not self.s_churn:
            return x, here
        if self.schedule is None:
            raise InputError(
                f"s_churn: got {self.s_churn:g} without a schedule, "
                "expected the sampler's for_schedule(schedule)"
            )
        r = here.step_start_sigma
        rises = (self.s_tmin <= r) & (r <= self.s_tmax) & jnp.isfinite(r)
        gamma = jnp.minimum(self.s_churn / here.num_steps.astype(r.dtype), math.sqrt(2) - 1)
        r = jnp.where(rises, r, 1)  # where nothing rises, any finite number
        t, alpha, sigma = self.schedule.level_of(r * (1 + gamma))
        rises = rises & (sigma > r * alpha)  # not beyond the highest level
        added = jnp.sqrt(jnp.maximum((sigma / alpha) ** 2 - r**2, 0)) * self.s_noise
        alpha, sigma, added = (per_image(a, x) for a in (alpha, sigma, added))
        noisy = alpha * (x / jnp.where(here.alpha > 0, here.alpha, 1) + added * noise_fn())
        above = noisy, t.astype(here.t.dtype), alpha, sigma
        x, t, alpha, sigma = select(rises, above, (x, here.t, here.alpha, here.sigma))
        return x, here._replace(t=t, alpha=alpha, sigma=sigma)
