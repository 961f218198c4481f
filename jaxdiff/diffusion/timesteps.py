"""Noise levels as a sampler visits them: in grids from the noisiest to the final one.

How diffusers' schedulers place theirs is in `checkpoints.schedulers`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Bool, Float, Int, NDArray


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
    """The noise level of each image: the time for the network, and x = alpha x0 + sigma eps.

    alpha and sigma have the axes of x, all but the first of length 1, so that they multiply it. A
    level belongs to a step: guidance that changes with the schedule is constant within one step,
    however often that step calls the network.
    """

    t: Float[Array, "b"]
    alpha: Float[Array, "b ..."]
    sigma: Float[Array, "b ..."]
    step: Int[Array, "b"]  # index of the step
    num_steps: Int[Array, "b"]  # of the whole schedule
    step_start_sigma: Float[Array, "b"]  # sigma / alpha where the step begins
    active: Bool[Array, "b"]  # whether what comes out is used; else the image rests

    def as_substep_of(self, here: "NoiseLevel", active: Bool[Array, "b"]) -> "NoiseLevel":
        """This level as an intermediate one of the step that starts from `here`."""
        return self._replace(step=here.step, step_start_sigma=here.step_start_sigma, active=active)


class TimestepGrid(NamedTuple):
    """The grids of b images for a compiled loop, padded so that the number of steps is data too.

    A grid of one row serves all images of a batch.
    """

    t: Float[Array, "b n_1"]
    alpha: Float[Array, "b n_1"]
    sigma: Float[Array, "b n_1"]
    init_noise_sigma: Float[Array, "b"]
    num_steps: Int[Array, "b"]
    first: Int[Array, "b"]  # the step that an image begins with
    last: Int[Array, "b"]  # and the one at which it rests, not run any more

    def for_images(self, count: int) -> "TimestepGrid":
        """The grid with one row for each of `count` images."""
        if len(self.t) == count:
            return self
        return TimestepGrid(*(jnp.broadcast_to(a, (count, *a.shape[1:])) for a in self))

    def level(self, step: Int[Array, "b"], ndim: int) -> NoiseLevel:
        """The levels at which these steps start and the ones before end, for x with `ndim` axes."""
        t, alpha, sigma = (
            jnp.take_along_axis(table, step[:, None], axis=1)[:, 0] for table in self[:3]
        )
        shape = (len(step),) + (1,) * (ndim - 1)
        return NoiseLevel(
            t,
            alpha.reshape(shape),
            sigma.reshape(shape),
            step=step,
            num_steps=self.num_steps,
            step_start_sigma=sigma / alpha,
            active=jnp.ones(len(step), bool),
        )

    @classmethod
    def from_host(
        cls, grid: HostTimestepGrid, length: int | None = None, dtype: Any = jnp.float32
    ) -> "TimestepGrid":
        """The grid of a host grid, one row, padded with clean levels to `length` steps."""
        num_steps = len(grid.t) - 1
        pad = (0, (length or num_steps) - num_steps)
        return cls(
            t=jnp.asarray(np.pad(grid.t, pad), dtype)[None],
            alpha=jnp.asarray(np.pad(grid.alpha, pad, constant_values=1.0), dtype)[None],
            sigma=jnp.asarray(np.pad(grid.sigma, pad), dtype)[None],
            init_noise_sigma=jnp.asarray([grid.init_noise_sigma], dtype),
            num_steps=jnp.asarray([num_steps], jnp.int32),
            first=jnp.zeros(1, jnp.int32),
            last=jnp.asarray([num_steps], jnp.int32),
        )
