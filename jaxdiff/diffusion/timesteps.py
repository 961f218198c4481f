"""Timestep grids: which noise levels a sampler visits, from the noisiest to the final one.

Computed on the host in float64. Checkpoints and samplers differ only in data: `SchedulerOptions` is
what a scheduler_config.json says, `SchedulerConvention` what diffusers' scheduler of that family
does, so that the same number of steps means the same noise levels in both libraries.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, Int, NDArray
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.schedules import NoiseSchedule, alpha_sigma_from_edm, interpolate


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


def lcm_timesteps(T: int, n: int, teacher: int) -> Float[NDArray, "n"]:
    """n of the times k T / teacher - 1 that a consistency model was trained at (2310.04378)."""
    if n > teacher:
        raise InputError(f"steps: got {n}, expected at most the {teacher} of the model's teacher")
    at = np.arange(teacher, 0, -1) * float(T // teacher) - 1
    return at[np.floor(np.linspace(0, teacher, n, endpoint=False)).astype(np.int64)]


def karras(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """EDM sigmas with equal distances in sigma^(1/7) (2206.00364, eq. 5)."""
    return np.linspace(first ** (1 / 7), last ** (1 / 7), n) ** 7


def exponential(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """EDM sigmas with equal distances in log sigma, which is DPM-Solver's uniform lambda."""
    return np.exp(np.linspace(np.log(first), np.log(last), n))


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
}
SPACINGS = (*TIMESTEP_SPACINGS, *SIGMA_SCHEDULES)

# Where a sampler cannot start from infinite noise, abar_T = 2^-24 stands for zero, as in diffusers.
MAX_SIGMA = float(np.sqrt(2.0**24 - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConvention:
    """How a family of samplers places its levels where a checkpoint leaves it open."""

    spacing: str = "leading"  # the default spacing of times, in TIMESTEP_SPACINGS or "lcm"
    fixed_spacing: bool = False  # whatever a checkpoint says
    extra_points: int = (
        0  # points that leading and linspace place beyond the steps, at the clean end
    )
    integer_timesteps: bool = True  # the network only sees the timesteps of training
    final_sigma: str = "zero"  # "zero", or the name of the option that decides
    set_alpha_to_one_default: bool = True  # the default of the option set_alpha_to_one
    in_sigma_space: bool = False  # sigmas must be finite; a checkpoint's sigma schedule applies
    sigma_range_from_timesteps: bool = False  # a sigma schedule spans those of the timesteps
    scale_initial_noise: bool = (
        False  # linspace and trailing start from sigma * noise, not 1 * noise
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """The options of a diffusers scheduler_config.json that decide the timesteps, by its names."""

    timestep_spacing: str | None = None  # None: the convention of the sampler
    sigma_schedule: str | None = None  # in SIGMA_SCHEDULES; diffusers: use_karras_sigmas
    steps_offset: int = 0  # added to leading times
    set_alpha_to_one: bool | None = None  # land on the clean image, False: on the first level
    final_sigmas_type: str = "zero"  # the same choice for others: "zero" or "sigma_min"
    original_inference_steps: int = 50  # steps of the teacher that a model was distilled from

    def __post_init__(self) -> None:
        if self.timestep_spacing is not None:
            one_of("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.sigma_schedule is not None:
            one_of("sigma_schedule", self.sigma_schedule, SIGMA_SCHEDULES)
        in_range("steps_offset", self.steps_offset, 0, 1000)
        one_of("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        in_range("original_inference_steps", self.original_inference_steps, 1, 1000)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SchedulerOptions":
        """Options from scheduler_config.json; raises InputError where it asks for what is not here.

        Keys of other scheduler classes are common in these files and are passed over.
        """
        for key, only in _SUPPORTED.items():
            if key in config and config[key] not in only:
                raise InputError(
                    f"scheduler_config.json: {key}: got {config[key]!r}, expected {only[0]!r}"
                )
        names = {f.name for f in dataclasses.fields(cls)} - {"sigma_schedule"}
        values = {k: v for k, v in config.items() if k in names and v is not None}
        curves = [name for name in SIGMA_SCHEDULES if config.get(f"use_{name}_sigmas")]
        return cls(sigma_schedule=curves[0] if curves else None, **values)

    def final_sigma_is_sigma_min(self, convention: SchedulerConvention) -> bool:
        """Whether the last step ends at the smallest sigma of the schedule instead of at 0."""
        to_one = self.set_alpha_to_one
        choices = {
            "zero": False,
            "set_alpha_to_one": not (
                convention.set_alpha_to_one_default if to_one is None else to_one
            ),
            "final_sigmas_type": self.final_sigmas_type == "sigma_min",
        }
        return choices[convention.final_sigma]


_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "thresholding": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "interpolation_type": ("linear", None),
    "timestep_type": ("discrete", None),
    "sigma_min": (None,),
    "sigma_max": (None,),
}


class HostTimestepGrid(NamedTuple):
    """The noise levels of n steps in float64: level 0 is the noisiest, level n the final one.

    `t` is the network's timestep; t[n] is 0, that of the first level of the schedule.
    `init_noise_sigma` is the standard deviation of the noise that the sampler starts from.
    """

    t: Float[NDArray, "n_1"]
    alpha: Float[NDArray, "n_1"]
    sigma: Float[NDArray, "n_1"]
    init_noise_sigma: float


def _choose(
    spacing: str | None, convention: SchedulerConvention, options: SchedulerOptions
) -> tuple[str, str | None]:
    """The timestep spacing, and the sigma schedule that replaces it if there is one."""
    asked = None if convention.fixed_spacing else options.timestep_spacing
    times = asked or convention.spacing
    if spacing is None:
        return times, options.sigma_schedule if convention.in_sigma_space else None
    one_of("timesteps", spacing, SPACINGS)
    return (times, spacing) if spacing in SIGMA_SCHEDULES else (spacing, None)


def _times(
    spacing: str, T: int, num_steps: int, convention: SchedulerConvention, options: SchedulerOptions
) -> NDArray:
    if spacing == "lcm":
        return lcm_timesteps(T, num_steps, options.original_inference_steps)
    offset = options.steps_offset
    t = TIMESTEP_SPACINGS[spacing](T, num_steps, convention.extra_points) + (
        offset if spacing == "leading" else 0
    )
    if t[0] > T - 1:
        raise InputError(
            f"steps: got {num_steps}, expected fewer: with leading spacing and steps_offset "
            f"{offset} the first timestep is {t[0]:.0f}, and the model was trained up to {T - 1}"
        )
    return np.round(t) if convention.integer_timesteps else t


def _apply_sigma_schedule(
    sigma_schedule: str, table: NDArray, sigma_edm: NDArray, convention: SchedulerConvention
) -> tuple[NDArray, NDArray]:
    """Timesteps and sigmas of a sigma schedule that replaces `sigma_edm`."""
    first, last = (
        (sigma_edm[0], sigma_edm[-1])
        if convention.sigma_range_from_timesteps
        else (table[-1], table[0])
    )
    sigma_edm = SIGMA_SCHEDULES[sigma_schedule](first, last, len(sigma_edm))
    t = np.interp(np.log(sigma_edm), np.log(table), np.arange(len(table)))
    if convention.integer_timesteps and convention.in_sigma_space:
        # So does DPM-Solver in diffusers; elsewhere the network gets the fractional timestep.
        t = np.round(t) if sigma_schedule == "karras" else np.floor(t)
    return t, sigma_edm


def make_timestep_grid(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    convention: SchedulerConvention,
    options: SchedulerOptions,
    spacing: str | None = None,
) -> HostTimestepGrid:
    """The noise levels of `num_steps` steps; `spacing`, if given, overrides `options`.

    Raises InputError for more steps than the spacing can place on the levels of the schedule.
    """
    in_range("steps", num_steps, 1, schedule.num_timesteps)
    times, sigma_schedule = _choose(spacing, convention, options)
    table = schedule.sigma_edm
    if convention.in_sigma_space or sigma_schedule:
        table = np.where(np.isinf(table), MAX_SIGMA, table)
    t = _times(times, schedule.num_timesteps, num_steps, convention, options)
    sigma_edm = interpolate(table, t)
    if sigma_schedule:
        t, sigma_edm = _apply_sigma_schedule(sigma_schedule, table, sigma_edm, convention)
    if np.any(np.diff(sigma_edm) >= 0):
        raise InputError(
            f"steps: got {num_steps}, expected fewer, so that no two have the same timestep"
        )
    final = table[0] if options.final_sigma_is_sigma_min(convention) else 0.0
    alpha, sigma = alpha_sigma_from_edm(np.append(sigma_edm, final))
    below_one = convention.scale_initial_noise and times != "leading"
    return HostTimestepGrid(np.append(t, 0.0), alpha, sigma, float(sigma[0]) if below_one else 1.0)


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
