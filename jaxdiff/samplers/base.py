"""The interface of samplers: state, step, and the quantities that the step rules share."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float, PyTree
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.diffusion.timesteps import NoiseLevel

# The standard normal noise of this step, one key per image; deterministic samplers never call it.
NoiseFn = Callable[[], Array]


class SamplingState(NamedTuple):
    """The state of the loop between two steps; every leaf is (b, ...)."""

    x: Float[Array, "b *d"]
    x0: Float[Array, "b *d"]  # D of the last step: for previews and multistep solvers
    sampler_state: PyTree  # other state of the solver
    guidance_state: PyTree  # state of the guidance rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """A step rule: a frozen choice without arrays."""

    # of convergence where steps change smoothly, of the variance if stochastic; None: not a solver
    order: ClassVar[int | None] = None
    stochastic: ClassVar[bool] = False  # whether it draws noise even where no option asks for it
    # whether noise is added back along `Prediction.eps`, be it that of another stream than x0's
    renoises_along_eps: ClassVar[bool] = False

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """The history before the first step, with leaves (b, ...); none by default."""
        del x
        return ()

    def nfe(
        self, steps: int, *, ends_clean: bool = True, restarts: Sequence[int] = ()
    ) -> list[int]:
        """The denoiser calls of each of `steps` steps.

        `ends_clean`: the last one ends at sigma 0; `restarts`: the steps that begin another phase.
        """
        del ends_clean, restarts
        return [1] * steps

    def for_schedule(self, schedule: Schedule) -> "Sampler":
        """The sampler for a network of this schedule: for levels that are not on the grid."""
        del schedule
        return self

    @abstractmethod
    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """Go from `here` to `there`, calling the denoiser as often as the method needs."""


def sigma_ratio(here: NoiseLevel, there: NoiseLevel) -> Float[Array, "b ..."]:
    """q = exp(-h) = (sigma' / alpha') / (sigma / alpha); 0 from pure noise or to a clean image."""
    return (there.sigma * here.alpha) / (here.sigma * there.alpha)


def log_snr_step(here: NoiseLevel, there: NoiseLevel) -> Float[Array, "b ..."]:
    """h = lambda' - lambda with lambda = log(alpha / sigma); infinite where `sigma_ratio` is 0."""
    return -jnp.log(sigma_ratio(here, there))


def ratio_step(here: NoiseLevel, there: NoiseLevel) -> Float[Array, "b ..."]:
    """alpha' (r' - r) with r = sigma / alpha, what a unit more of noise along a step adds to x'.

    0 from pure noise, where it would be infinite.
    """
    step = there.sigma - there.alpha * here.sigma / here.alpha
    return jnp.where(here.alpha > 0, step, 0)


def is_finite_step(here: NoiseLevel, there: NoiseLevel) -> Bool[Array, "b"]:
    """Where h is finite: neither from pure noise nor to a clean image, and not at rest."""
    return (sigma_ratio(here, there) > 0).reshape(-1) & here.active


def full_per_image(x: Float[Array, "b *d"], value: float) -> Float[Array, "b ..."]:
    """`value` for each image, in a shape that multiplies x."""
    return jnp.full((len(x),) + (1,) * (x.ndim - 1), value, x.dtype)
