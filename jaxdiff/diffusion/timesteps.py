"""Grids: which noise levels a sampler visits, from the first to the one where it lands.

Laid out on the host in float64. What checkpoints and samplers differ in is data: `GridOptions` is
what a scheduler_config.json says, `Convention` what diffusers' scheduler of that family does, so
that the same number of steps means the same noise levels here and there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, Int, NDArray
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.schedules import NoiseSchedule, interpolate, levels_of


def leading(T: int, n: int, extra: int) -> Float[NDArray, "n"]:
    """Multiples of T // n from 0 up: never reaches T-1 (2305.08891, table 2)."""
    return np.arange(n + extra)[::-1][:n] * float(T // (n + extra))


def linspace(T: int, n: int, extra: int) -> Float[NDArray, "n"]:
    """Equal distances from T-1 to 0 (2305.08891, table 2); one single step starts at T-1."""
    return np.linspace(0, T - 1, max(n + extra, 2))[::-1][:n]


def trailing(T: int, n: int, extra: int) -> Float[NDArray, "n"]:
    """Multiples of T / n from T down, less 1 (2305.08891, table 2): for few steps and zero SNR."""
    # Written so, halves round as they do in the reference implementation.
    return np.round(np.arange(T, 0, -T / n)[:n]) - 1


def distilled(T: int, n: int, teacher: int) -> Float[NDArray, "n"]:
    """n of the times k T / teacher - 1 that a consistency model was trained at (2310.04378)."""
    if n > teacher:
        raise InputError(f"steps: got {n}, expected at most the {teacher} of the model's teacher")
    at = np.arange(teacher, 0, -1) * float(T // teacher) - 1
    return at[np.floor(np.linspace(0, teacher, n, endpoint=False)).astype(np.int64)]


def karras(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """Ratios with equal distances in ratio^(1/7) (EDM, 2206.00364, eq. 5)."""
    return np.linspace(first ** (1 / 7), last ** (1 / 7), n) ** 7


def exponential(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """Ratios with equal distances in their logarithm, which is DPM-Solver's uniform lambda."""
    return np.exp(np.linspace(np.log(first), np.log(last), n))


# A spacing of times is given T, the steps and the points to place beyond them; a curve of ratios
# runs between two ratios.
TIMES: dict[str, Callable[[int, int, int], NDArray]] = {
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
}
CURVES: dict[str, Callable[[float, float, int], NDArray]] = {
    "karras": karras,
    "exponential": exponential,
}
SPACINGS = (*TIMES, *CURVES)

# Where a sampler cannot start from infinite noise, abar_T = 2^-24 stands for zero, as in diffusers.
LARGEST_RATIO = float(np.sqrt(2.0**24 - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
    """How a family of samplers places its levels where a checkpoint leaves it open."""

    spacing: str = "leading"  # the default spacing of times, a name in TIMES or "distilled"
    own_spacing: bool = False  # whatever a checkpoint says
    extra: int = 0  # points that leading and linspace place beyond the steps, at the clean end
    whole_times: bool = True  # the network is only told the times of training
    lands_on: str = "zero"  # "zero", or the option that decides: see GridOptions.lands_on_first
    alpha_to_one: bool = True  # the default of the option set_alpha_to_one
    in_ratios: bool = False  # works in ratios: they must be finite; a checkpoint's curve applies
    curve_within_times: bool = False  # a curve spans the ratios of the times, not of the schedule
    starts_below_one: bool = False  # linspace and trailing start from sigma * noise, not 1 * noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridOptions:
    """What a diffusers scheduler_config.json says about grids; names and defaults are its own."""

    timestep_spacing: str | None = None  # None: the convention of the sampler
    curve: str | None = None  # a name in CURVES; diffusers: use_karras_sigmas, ...
    steps_offset: int = 0  # added to leading times
    set_alpha_to_one: bool | None = None  # land on the clean image, False: on the first level
    final_sigmas_type: str = "zero"  # the same choice for others: "zero" or "sigma_min"
    original_inference_steps: int = 50  # steps of the teacher that a model was distilled from

    def __post_init__(self) -> None:
        if self.timestep_spacing is not None:
            one_of("timestep_spacing", self.timestep_spacing, TIMES)
        if self.curve is not None:
            one_of("curve", self.curve, CURVES)
        in_range("steps_offset", self.steps_offset, 0, 1000)
        one_of("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        in_range("original_inference_steps", self.original_inference_steps, 1, 1000)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "GridOptions":
        """Options from scheduler_config.json; raises InputError where it asks for what is not here.

        Keys of other scheduler classes are common in these files and are passed over.
        """
        for key, only in _SUPPORTED.items():
            if key in config and config[key] not in only:
                raise InputError(
                    f"scheduler_config.json: {key}: got {config[key]!r}, expected {only[0]!r}"
                )
        names = {f.name for f in dataclasses.fields(cls)} - {"curve"}
        values = {k: v for k, v in config.items() if k in names and v is not None}
        curves = [name for name in CURVES if config.get(f"use_{name}_sigmas")]
        return cls(curve=curves[0] if curves else None, **values)

    def lands_on_first(self, convention: Convention) -> bool:
        """Whether the last step goes to the first level of the schedule instead of to ratio 0."""
        to_one = self.set_alpha_to_one
        choices = {
            "zero": False,
            "set_alpha_to_one": not (convention.alpha_to_one if to_one is None else to_one),
            "final_sigmas_type": self.final_sigmas_type == "sigma_min",
        }
        return choices[convention.lands_on]


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


class Layout(NamedTuple):
    """The levels of n steps in float64: level 0 is the noisiest, level n where the last step lands.

    `t` is what the network is told; t[n] is 0, the time of the first level of the schedule. `start`
    is the standard deviation of the noise that the sampler starts from.
    """

    t: Float[NDArray, "n_1"]
    alpha: Float[NDArray, "n_1"]
    sigma: Float[NDArray, "n_1"]
    start: float


def _choose(
    spacing: str | None, convention: Convention, options: GridOptions
) -> tuple[str, str | None]:
    """The spacing of times, and the curve of ratios that replaces them if there is one."""
    asked = None if convention.own_spacing else options.timestep_spacing
    times = asked or convention.spacing
    if spacing is None:
        return times, options.curve if convention.in_ratios else None
    one_of("timesteps", spacing, SPACINGS)
    return (times, spacing) if spacing in CURVES else (spacing, None)


def _times(
    spacing: str, T: int, steps: int, convention: Convention, options: GridOptions
) -> NDArray:
    if spacing == "distilled":
        return distilled(T, steps, options.original_inference_steps)
    offset = options.steps_offset
    t = TIMES[spacing](T, steps, convention.extra) + (offset if spacing == "leading" else 0)
    if t[0] > T - 1:
        raise InputError(
            f"steps: got {steps}, expected fewer: with leading spacing and steps_offset {offset} "
            f"the first time is {t[0]:.0f} and the last of the training {T - 1}"
        )
    return np.round(t) if convention.whole_times else t


def _curve(
    curve: str, table: NDArray, ratio: NDArray, convention: Convention
) -> tuple[NDArray, NDArray]:
    """Times and ratios of a curve that replaces `ratio`."""
    first, last = (ratio[0], ratio[-1]) if convention.curve_within_times else (table[-1], table[0])
    ratio = CURVES[curve](first, last, len(ratio))
    t = np.interp(np.log(ratio), np.log(table), np.arange(len(table)))
    if convention.whole_times and convention.in_ratios:
        # So does DPM-Solver in diffusers; elsewhere the network is told the time that fits.
        t = np.round(t) if curve == "karras" else np.floor(t)
    return t, ratio


def layout(
    schedule: NoiseSchedule,
    steps: int,
    *,
    convention: Convention,
    options: GridOptions,
    spacing: str | None = None,
) -> Layout:
    """The noise levels of `steps` steps; `spacing` is the user's choice over what `options` say.

    Raises InputError for more steps than the spacing can place on the levels of the schedule.
    """
    in_range("steps", steps, 1, schedule.levels)
    times, curve = _choose(spacing, convention, options)
    table = schedule.ratio
    if convention.in_ratios or curve:
        table = np.where(np.isinf(table), LARGEST_RATIO, table)
    t = _times(times, schedule.levels, steps, convention, options)
    ratio = interpolate(table, t)
    if curve:
        t, ratio = _curve(curve, table, ratio, convention)
    if np.any(np.diff(ratio) >= 0):
        raise InputError(f"steps: got {steps}, expected fewer: two of them would be at one time")
    final = table[0] if options.lands_on_first(convention) else 0.0
    alpha, sigma = levels_of(np.append(ratio, final))
    below_one = convention.starts_below_one and times != "leading"
    return Layout(np.append(t, 0.0), alpha, sigma, float(sigma[0]) if below_one else 1.0)


class Level(NamedTuple):
    """One noise level: the time for the network, and x = alpha x0 + sigma eps.

    It belongs to a step: guidance that changes on the way holds still within one step, however
    often that step asks the network.
    """

    t: Float[Array, ""]
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]
    step: int | Int[Array, ""]  # the number of the step, from 0
    steps: int | Int[Array, ""]  # of which there are so many
    entry: Float[Array, ""]  # the ratio sigma / alpha where the step begins

    def within(self, here: "Level") -> "Level":
        """This level as one that the step from `here` asks about on its way."""
        return self._replace(step=here.step, entry=here.entry)


class Grid(NamedTuple):
    """A layout as arrays for a compiled loop, padded so that the number of steps is data too."""

    t: Float[Array, "n_1"]
    alpha: Float[Array, "n_1"]
    sigma: Float[Array, "n_1"]
    start: Float[Array, ""]
    steps: Int[Array, ""]

    def level(self, i: int | Int[Array, ""]) -> Level:
        """The level from which step i starts, and where step i - 1 lands."""
        alpha, sigma = self.alpha[i], self.sigma[i]
        return Level(self.t[i], alpha, sigma, step=i, steps=self.steps, entry=sigma / alpha)

    @classmethod
    def of(cls, layout: Layout, length: int | None = None, dtype: Any = jnp.float32) -> "Grid":
        """The grid of a layout, padded with clean levels to `length` steps."""
        steps = len(layout.t) - 1
        pad = (0, (length or steps) - steps)
        return cls(
            t=jnp.asarray(np.pad(layout.t, pad), dtype),
            alpha=jnp.asarray(np.pad(layout.alpha, pad, constant_values=1.0), dtype),
            sigma=jnp.asarray(np.pad(layout.sigma, pad), dtype),
            start=jnp.asarray(layout.start, dtype),
            steps=jnp.asarray(steps, jnp.int32),
        )
