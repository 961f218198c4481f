"""Scheduler configs of diffusers: the schedule, the sampler, and which noise levels it visits.

Checkpoints and samplers differ only in data: `SchedulerOptions` is what a scheduler_config.json
says, `SchedulerConvention` what diffusers' scheduler of that sampler does where it says nothing. So
the same number of steps means the same noise levels in both libraries. Grids are computed on the
host in float64.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxdiff.checkpoints.prediction_type import FLOW, stored_prediction_type
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.predictions import PREDICTION_TYPES
from jaxdiff.diffusion.schedules import (
    MAX_SIGMA,
    EDMSchedule,
    FlowSchedule,
    Schedule,
    VPSchedule,
    alpha_sigma_from_edm,
    interpolate,
    resolution_shift,
)
from jaxdiff.diffusion.timesteps import HostTimestepGrid, TimestepGrid, exponential, karras
from jaxdiff.samplers.registry import registered_name

# For classes of diffusers the samplers that they stand for, with the values that options of theirs
# must have. Where one is not given the class takes the first value of the first sampler.
Options = Mapping[str, tuple[Any, ...]]
_MULTISTEP: Options = {
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "euler_at_final": (False,),
}
SCHEDULERS: dict[str, dict[str, Options]] = {
    "DDPMScheduler": {"ddpm": {"variance_type": ("fixed_small", "fixed_small_log")}},
    "DDIMScheduler": {"ddim": {}},
    "PNDMScheduler": {"pndm": {"skip_prk_steps": (True,)}},
    "EulerDiscreteScheduler": {"euler": {}},
    "EulerAncestralDiscreteScheduler": {"euler-ancestral": {}},
    "HeunDiscreteScheduler": {"heun": {}},
    "DPMSolverSinglestepScheduler": {
        "dpmpp-2s": {
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (2,),
            "solver_type": ("midpoint",),
            "final_sigmas_type": ("zero",),
        }
    },
    "DPMSolverMultistepScheduler": {
        "dpmpp-2m": {"algorithm_type": ("dpmsolver++",), "solver_order": (2,), **_MULTISTEP},
        "dpmpp-2m-sde": {
            "algorithm_type": ("sde-dpmsolver++",),
            "solver_order": (2,),
            **_MULTISTEP,
        },
        "dpmpp-3m-sde": {
            "algorithm_type": ("sde-dpmsolver++",),
            "solver_order": (3,),
            **_MULTISTEP,
        },
    },
    "UniPCMultistepScheduler": {
        "unipc": {
            "solver_order": (2,),
            "solver_type": ("bh2",),
            "predict_x0": (True,),
            "disable_corrector": ([],),
            "solver_p": (None,),
            "lower_order_final": (True,),
            "final_sigmas_type": ("zero",),
        }
    },
    "LCMScheduler": {"lcm": {"timestep_scaling": (10.0,)}},
    FLOW: {"euler": {}},
}


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The noise schedule of a diffusers scheduler_config.json, whatever class wrote it."""
    if config.get("_class_name") != FLOW:
        return VPSchedule.from_config(config)
    scale = config.get("num_train_timesteps", 1000)
    return FlowSchedule(time_scale=float(scale), shift=float(config.get("shift", 1.0)))


def prediction_type_of(config: Mapping[str, Any]) -> str:
    """What the network of a diffusers scheduler_config.json predicts; InputError if unknown."""
    name = stored_prediction_type(config)
    return one_of("scheduler_config.json: prediction_type", name, PREDICTION_TYPES)


def sampler_name(config: Mapping[str, Any]) -> str:
    """The sampler that a diffusers scheduler_config.json asks for.

    Raises InputError if there is none; any other can still be chosen by name.
    """
    scheduler = str(config.get("_class_name", "DDIMScheduler")).removeprefix("Flax")
    known = SCHEDULERS[one_of("scheduler_config.json: _class_name", scheduler, SCHEDULERS)]
    default = next(iter(known.values()))
    settings = {key: values[0] for key, values in default.items()} | dict(config)
    refused = {
        name: [key for key, values in options.items() if settings[key] not in values]
        for name, options in known.items()
    }
    name = min(refused, key=lambda name: len(refused[name]))
    for key in refused[name]:
        raise InputError(
            f"scheduler_config.json: {key}: got {settings[key]!r}, expected {known[name][key][0]!r}"
        )
    return name


MAX_CONTINUOUS_STEPS = 1000  # of a schedule without levels of its own


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


_SIGMAS = SchedulerConvention(
    spacing="linspace",
    integer_timesteps=False,
    final_sigma="final_sigmas_type",
    in_sigma_space=True,
    sigma_range_from_timesteps=True,
    scale_initial_noise=True,
)
_DPM_SOLVER = SchedulerConvention(
    spacing="linspace", extra_points=1, final_sigma="final_sigmas_type", in_sigma_space=True
)
# Those of samplers that are not here are the defaults.
CONVENTIONS: dict[str, SchedulerConvention] = {
    "ddim": SchedulerConvention(final_sigma="set_alpha_to_one"),
    "pndm": SchedulerConvention(final_sigma="set_alpha_to_one", set_alpha_to_one_default=False),
    "euler": _SIGMAS,
    "euler-ancestral": dataclasses.replace(_SIGMAS, final_sigma="zero"),
    "heun": dataclasses.replace(_SIGMAS, final_sigma="zero"),
    "dpmpp-2s": dataclasses.replace(_DPM_SOLVER, fixed_spacing=True),
    **dict.fromkeys(("dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m-sde", "unipc"), _DPM_SOLVER),
    "lcm": SchedulerConvention(spacing="lcm", fixed_spacing=True),
}


def convention_of(sampler: str) -> SchedulerConvention:
    """How diffusers' scheduler of this sampler, described with or without options, does it."""
    return CONVENTIONS.get(registered_name(sampler), SchedulerConvention())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """The options of a diffusers scheduler_config.json that decide the timesteps, by its names."""

    timestep_spacing: str | None = None  # None: the convention of the sampler
    sigma_schedule: str | None = None  # in SIGMA_SCHEDULES; diffusers: use_karras_sigmas
    steps_offset: int = 0  # added to leading times
    set_alpha_to_one: bool | None = None  # land on the clean image, False: on the first level
    final_sigmas_type: str = "zero"  # the same choice for others: "zero" or "sigma_min"
    original_inference_steps: int = 50  # steps of the teacher that a model was distilled from
    # of flows
    use_dynamic_shifting: bool = False  # a shift by the number of tokens of an image
    time_shift_type: str = "exponential"  # of which this is the logarithm, or "linear"
    base_image_seq_len: int = 256  # at this many tokens ...
    base_shift: float = 0.5  # ... it is this
    max_image_seq_len: int = 4096
    max_shift: float = 1.15
    shift_terminal: float | None = None  # the noise of the last level but one, by stretching

    def __post_init__(self) -> None:
        if self.timestep_spacing is not None:
            one_of("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.sigma_schedule is not None:
            one_of("sigma_schedule", self.sigma_schedule, SIGMA_SCHEDULES)
        in_range("steps_offset", self.steps_offset, 0, 1000)
        one_of("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        in_range("original_inference_steps", self.original_inference_steps, 1, 1000)
        one_of("time_shift_type", self.time_shift_type, ("exponential", "linear"))
        if self.shift_terminal is not None:
            in_range("shift_terminal", self.shift_terminal, 0, 1)

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
    "invert_sigmas": (False, None),
    "stochastic_sampling": (False, None),
    "interpolation_type": ("linear", None),
    "timestep_type": ("discrete", None),
    "sigma_min": (None,),
    "sigma_max": (None,),
}


def _choose(
    spacing: str | None, convention: SchedulerConvention, options: SchedulerOptions
) -> tuple[str, str | None]:
    """The timestep spacing, and the sigma schedule that replaces it if there is one."""
    asked = None if convention.fixed_spacing else options.timestep_spacing
    times = asked or convention.spacing
    if spacing is None:
        return times, options.sigma_schedule if convention.in_sigma_space else None
    one_of("timestep_spacing", spacing, SPACINGS)
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
    sigma_schedule: str,
    schedule: VPSchedule,
    table: NDArray,
    sigma_edm: NDArray,
    convention: SchedulerConvention,
) -> tuple[NDArray, NDArray]:
    """Timesteps and sigmas of a sigma schedule that replaces `sigma_edm`."""
    first, last = (
        (sigma_edm[0], sigma_edm[-1])
        if convention.sigma_range_from_timesteps
        else (table[-1], table[0])
    )
    sigma_edm = SIGMA_SCHEDULES[sigma_schedule](first, last, len(sigma_edm))
    t = schedule.time_of(sigma_edm)
    if convention.integer_timesteps and convention.in_sigma_space:
        # So does DPM-Solver in diffusers; elsewhere the network gets the fractional timestep.
        t = np.round(t) if sigma_schedule == "karras" else np.floor(t)
    return t, sigma_edm


def _vp_grid(
    schedule: VPSchedule,
    num_steps: int,
    convention: SchedulerConvention,
    options: SchedulerOptions,
    spacing: str | None,
) -> HostTimestepGrid:
    """As the schedulers of discrete levels place them."""
    in_range("steps", num_steps, 1, schedule.num_discrete)
    times, sigma_schedule = _choose(spacing, convention, options)
    table = schedule.sigma_edm
    if convention.in_sigma_space or sigma_schedule:
        table = np.where(np.isinf(table), MAX_SIGMA, table)
    t = _times(times, schedule.num_discrete, num_steps, convention, options)
    sigma_edm = interpolate(table, t)
    if sigma_schedule:
        t, sigma_edm = _apply_sigma_schedule(sigma_schedule, schedule, table, sigma_edm, convention)
    final = table[0] if options.final_sigma_is_sigma_min(convention) else 0.0
    alpha, sigma = alpha_sigma_from_edm(np.append(sigma_edm, final))
    below_one = convention.scale_initial_noise and times != "leading"
    return HostTimestepGrid(np.append(t, 0.0), alpha, sigma, float(sigma[0]) if below_one else 1.0)


def _flow_grid(
    schedule: FlowSchedule,
    num_steps: int,
    options: SchedulerOptions,
    spacing: str | None,
    num_tokens: int | None,
) -> HostTimestepGrid:
    """As FlowMatchEulerDiscreteScheduler places them: the shift of the first and last level, twice.

    "trailing", the default of a shift by resolution, is n/n ... 1/n, shifted once.
    """
    in_range("steps", num_steps, 1, MAX_CONTINUOUS_STEPS)
    if spacing is not None:
        one_of("timestep_spacing", spacing, ("trailing", "linspace", *SIGMA_SCHEDULES))
    if options.use_dynamic_shifting:
        schedule = dataclasses.replace(schedule, shift=_dynamic_shift(options, num_tokens))
    default = "trailing" if options.use_dynamic_shifting else "linspace"
    if (spacing if spacing in ("trailing", "linspace") else default) == "trailing":
        s = np.arange(num_steps, 0, -1) / num_steps
    else:
        s = np.linspace(1, schedule.shifted(np.array([1 / schedule.time_scale]))[0], num_steps)
    s = schedule.shifted(s)
    if options.shift_terminal:
        s = 1 - (1 - s) * (1 - options.shift_terminal) / (1 - s[-1])
    curve = spacing if spacing in SIGMA_SCHEDULES else None
    if curve := curve or (options.sigma_schedule if spacing is None else None):
        s = SIGMA_SCHEDULES[curve](s[0], s[-1], num_steps)
    t = schedule.time_scale * np.append(s, 0.0)
    return HostTimestepGrid(t, *schedule.alpha_sigma(t), 1.0)


def _dynamic_shift(options: SchedulerOptions, num_tokens: int | None) -> float:
    if num_tokens is None:
        raise InputError("num_tokens: got none, expected the tokens of an image, for its shift")
    base = options.base_image_seq_len, options.base_shift
    largest = options.max_image_seq_len, options.max_shift
    shift = resolution_shift(num_tokens, base=base, largest=largest)
    return shift if options.time_shift_type == "exponential" else math.log(shift)


def _edm_grid(
    schedule: EDMSchedule, num_steps: int, options: SchedulerOptions, spacing: str | None
) -> HostTimestepGrid:
    """As EDMEulerScheduler places them: from sigma_max to sigma_min, by default karras."""
    in_range("steps", num_steps, 1, MAX_CONTINUOUS_STEPS)
    curve = one_of(
        "timestep_spacing", spacing or options.sigma_schedule or "karras", SIGMA_SCHEDULES
    )
    noise = SIGMA_SCHEDULES[curve](schedule.sigma_max, schedule.sigma_min, num_steps)
    t = schedule.time_of(noise / schedule.sigma_data)
    alpha, sigma = schedule.alpha_sigma(t)
    return HostTimestepGrid(
        np.append(t, 0.0), np.append(alpha, 1.0), np.append(sigma, 0.0), float(sigma[0])
    )


def make_host_grid(
    schedule: Schedule,
    sampler: str,
    steps: int,
    *,
    spacing: str | None = None,
    options: SchedulerOptions | None = None,
    num_tokens: int | None = None,
) -> HostTimestepGrid:
    """The grid of `make_grid` in float64."""
    options, convention = options or SchedulerOptions(), convention_of(sampler)
    if isinstance(schedule, FlowSchedule):
        grid = _flow_grid(schedule, steps, options, spacing, num_tokens)
    elif isinstance(schedule, EDMSchedule):
        grid = _edm_grid(schedule, steps, options, spacing)
    elif isinstance(schedule, VPSchedule):
        grid = _vp_grid(schedule, steps, convention, options, spacing)
    else:
        raise TypeError(f"schedule: got {type(schedule).__name__}, whose levels nothing places")
    # sigma / alpha falls: written without a division by the alpha of pure noise
    if np.any(grid.sigma[1:-1] * grid.alpha[:-2] >= grid.sigma[:-2] * grid.alpha[1:-1]):
        raise InputError(
            f"steps: got {steps}, expected fewer, so that no two have the same timestep"
        )
    return grid


def make_grid(
    schedule: Schedule,
    sampler: str,
    steps: int,
    *,
    prediction_type: str,
    spacing: str | None = None,
    options: SchedulerOptions | None = None,
    num_tokens: int | None = None,
) -> TimestepGrid:
    """The grid of `steps` steps of a sampler, for a network that predicts `prediction_type`.

    `spacing` is the user's choice, `options` what the checkpoint says; where both leave something
    open, diffusers' convention for that sampler decides. `num_tokens` of an image decide the shift
    of a flow by resolution. Grids of one schedule all have the same shape, so that another number
    of steps compiles nothing. Raises InputError.
    """
    levels = make_host_grid(
        schedule, sampler, steps, spacing=spacing, options=options, num_tokens=num_tokens
    )
    if prediction_type == "epsilon" and levels.alpha[0] == 0:
        raise InputError(
            "prediction_type: got 'epsilon' with a zero-terminal-SNR schedule or a flow, "
            "expected 'v_prediction' or 'sample': noise says nothing about the image there"
        )
    return TimestepGrid.from_host(levels, length=schedule.num_discrete or MAX_CONTINUOUS_STEPS)
