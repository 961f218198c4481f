"""Noise levels as a sampler visits them: in grids from the noisiest to the final one.

How diffusers' schedulers place theirs is in `checkpoints.schedulers`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Float, Int, NDArray


def karras(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """EDM sigmas with equal distances in sigma^(1/7) (2206.00364, eq. 5)."""
    return np.linspace(first ** (1 / 7), last ** (1 / 7), n) ** 7


def exponential(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """EDM sigmas with equal distances in log sigma, which is DPM-Solver's uniform lambda."""
    return np.exp(np.linspace(np.log(first), np.log(last), n))


class HostTimestepGrid(NamedTuple):
    """The noise levels of n steps in float64: level 0 is the noisiest, level n the final one.

    `t` is the network's timestep; t[n] is 0, that of the first level of the schedule.
    `init_noise_sigma` is the standard deviation of the noise that the sampler starts from.
    """

    t: Float[NDArray, "n_1"]
    alpha: Float[NDArray, "n_1"]
    sigma: Float[NDArray, "n_1"]
    init_noise_sigma: float


class NoiseLevel(NamedTuple):
    """One noise level: the time for the network, and x = alpha x0 + sigma eps.

    It belongs to a step: guidance that changes with the schedule is constant within one step,
    however often that step calls the network.
    """

    t: Float[Array, ""]
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    step: int | Int[Array, ""]  # index of the step
    num_steps: int | Int[Array, ""]  # of the whole schedule
    step_start_sigma: Float[Array, ""]  # sigma / alpha where the step begins

    def as_substep_of(self, here: "NoiseLevel") -> "NoiseLevel":
        """This level as an intermediate one of the step that starts from `here`."""
        return self._replace(step=here.step, step_start_sigma=here.step_start_sigma)


class TimestepGrid(NamedTuple):
    """A grid as arrays for a compiled loop, padded so that the number of steps is data too."""

    t: Float[Array, "n_1"]
    alpha: Float[Array, "n_1"]
    sigma: Float[Array, "n_1"]
    init_noise_sigma: Float[Array, ""]
    num_steps: Int[Array, ""]

    def level(self, i: int | Int[Array, ""]) -> NoiseLevel:
        """The noise level at which step i starts and step i - 1 ends."""
        alpha, sigma = self.alpha[i], self.sigma[i]
        return NoiseLevel(
            self.t[i],
            alpha,
            sigma,
            step=i,
            num_steps=self.num_steps,
            step_start_sigma=sigma / alpha,
        )

    @classmethod
    def from_host(
        cls, grid: HostTimestepGrid, length: int | None = None, dtype: Any = jnp.float32
    ) -> "TimestepGrid":
        """The grid of a host grid, padded with clean levels to `length` steps."""
        num_steps = len(grid.t) - 1
        pad = (0, (length or num_steps) - num_steps)
        return cls(
            t=jnp.asarray(np.pad(grid.t, pad), dtype),
            alpha=jnp.asarray(np.pad(grid.alpha, pad, constant_values=1.0), dtype),
            sigma=jnp.asarray(np.pad(grid.sigma, pad), dtype),
            init_noise_sigma=jnp.asarray(grid.init_noise_sigma, dtype),
            num_steps=jnp.asarray(num_steps, jnp.int32),
        )
