"""What a step rule is: its state, its inputs and the quantities that the rules share."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.timesteps import NoiseLevel, SchedulerConvention

# The standard normal noise of this step, one key per image; deterministic rules never ask for it.
Draw = Callable[[], Array]


class Carry(NamedTuple):
    """The state of the loop between two steps."""

    x: Float[Array, "b *d"]
    x0: Float[Array, "b *d"]  # D of the last step: a preview, and the memory of multistep rules
    history: PyTree  # what else the step rule remembers
    memory: PyTree  # what the guidance rule remembers


@runtime_checkable
class Sampler(Protocol):
    """A step rule: a frozen choice without arrays."""

    @property
    def convention(self) -> SchedulerConvention:
        """How the rule places its noise levels."""
        ...

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """The history before the first step."""
        ...

    def step(
        self, denoise: Denoiser, carry: Carry, here: NoiseLevel, there: NoiseLevel, draw: Draw
    ) -> Carry:
        """Go from `here` to `there`, calling the denoiser as often as the method needs."""
        ...


def decay(here: NoiseLevel, there: NoiseLevel) -> Float[Array, ""]:
    """q = exp(-h) = (sigma' / alpha') / (sigma / alpha); 0 from pure noise or to a clean image."""
    return (there.sigma * here.alpha) / (here.sigma * there.alpha)


def log_snr_step(here: NoiseLevel, there: NoiseLevel) -> Float[Array, ""]:
    """h = lambda' - lambda with lambda = log(alpha / sigma); infinite where `decay` is 0."""
    return -jnp.log(decay(here, there))


def ratio_step(here: NoiseLevel, there: NoiseLevel) -> Float[Array, ""]:
    """alpha' (r' - r) with r = sigma / alpha, what a unit more of noise along a step adds to x'.

    0 from pure noise, where it would be infinite.
    """
    step = there.sigma - there.alpha * here.sigma / here.alpha
    return jnp.where(here.alpha > 0, step, 0)
