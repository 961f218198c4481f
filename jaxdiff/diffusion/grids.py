"""Grids of noise levels: how their times are spaced, and those of the images of a batch.

How diffusers' schedulers place the levels of a grid is in `checkpoints.timestep_grids`.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, Int, NDArray
from jaxdiff.diffusion.denoising import NoiseLevel


def leading(T: int, n: int, extra_points: int) -> Float[NDArray, "n"]:
    """Multiples of T // n from 0 up: never reaches T-1 (2305.08891, table 2)."""
    return np.arange(n + extra_points)[::-1][:n] * float(T // (n + extra_points))


def linspace(T: int, n: int, extra_points: int) -> Float[NDArray, "n"]:
    """Equal distances from T-1 to 0 (2305.08891, table 2); one single step starts at T-1."""
    return np.linspace(0, T - 1, max(n + extra_points, 2))[::-1][:n]


def trailing(T: int, n: int, extra_points: int) -> Float[NDArray, "n"]:
    """Multiples of T / n from T down, less 1 (2305.08891, table 2): for few steps and zero SNR."""
    # Written so, halves round as they do in the reference implementation.
    return np.round(np.arange(T, 0, -T / n)[:n]) - 1


def karras(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """EDM sigmas with equal distances in sigma^(1/7) (2206.00364, eq. 5)."""
    return np.linspace(first ** (1 / 7), last ** (1 / 7), n) ** 7


def exponential(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """EDM sigmas with equal distances in log sigma, which is DPM-Solver's uniform lambda."""
    return np.exp(np.linspace(np.log(first), np.log(last), n))


def beta(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """EDM sigmas at quantiles of Beta(0.6, 0.6), which are dense at both ends (2407.12173)."""
    return last + (first - last) * betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, n))


# A timestep spacing takes T, the number of steps and of extra points at the clean end; a sigma
# schedule takes the first and the last sigma and the number of steps.
TIMESTEP_SPACINGS: dict[str, Callable[[int, int, int], NDArray]] = {
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
}
SIGMA_SCHEDULES: dict[str, Callable[[float, float, int], NDArray]] = {
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
}
SPACINGS = (*TIMESTEP_SPACINGS, *SIGMA_SCHEDULES)


def listed_timesteps(spacing: str | None) -> list[int] | None:
    """The timesteps that a spacing such as "999,749,499,249" lists; None for any other."""
    is_list = spacing is not None and re.fullmatch(r"\d{1,6}(,\d{1,6})*", spacing)
    return [int(t) for t in str(spacing).split(",")] if is_list else None


def check_timesteps(listed: list[int], T: int, num_steps: int) -> Float[NDArray, "n"]:
    """The listed timesteps; InputError unless they are `num_steps`, fall, and are below T."""
    if len(listed) != num_steps:
        raise InputError(f"steps: got {num_steps} with {len(listed)} timesteps, expected as many")
    if listed[0] >= T or any(a <= b for a, b in itertools.pairwise(listed)):
        raise InputError(
            f"timestep_spacing: got {','.join(map(str, listed))}, expected timesteps that fall, "
            f"from at most {T - 1} on"
        )
    return np.array(listed, float)


class HostTimestepGrid(NamedTuple):
    """The noise levels of n steps in float64: level 0 is the noisiest, level n the final one.

    `t` is the network's timestep; t[n] is 0, that of the first level of the schedule.
    `init_noise_sigma` is the standard deviation of the noise that the sampler starts from.
    """

    t: Float[NDArray, "n_1"]
    alpha: Float[NDArray, "n_1"]
    sigma: Float[NDArray, "n_1"]
    init_noise_sigma: float


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
