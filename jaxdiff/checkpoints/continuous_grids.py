"""Timestep grids of schedules with continuous times, as diffusers' schedulers place them."""

import dataclasses
import math

import numpy as np

from jaxdiff.checkpoints.schedulers import SchedulerOptions
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.grids import SIGMA_SCHEDULES, HostTimestepGrid
from jaxdiff.diffusion.schedules import EDMSchedule, FlowSchedule, resolution_shift

MAX_CONTINUOUS_STEPS = 1000


def flow_grid(
    schedule: FlowSchedule,
    num_steps: int,
    options: SchedulerOptions,
    spacing: str | None,
    num_tokens: int | None,
) -> HostTimestepGrid:
    """As FlowMatchEulerDiscreteScheduler places them: the shift of the first and last level, twice.

    "trailing", the default of a shift by resolution and of FLUX.1, is n/n ... 1/n, shifted once.
    """
    in_range("steps", num_steps, 1, MAX_CONTINUOUS_STEPS)
    if spacing is not None:
        one_of("timestep_spacing", spacing, ("trailing", "linspace", *SIGMA_SCHEDULES))
    if options.use_dynamic_shifting:
        schedule = dataclasses.replace(schedule, shift=_dynamic_shift(options, num_tokens))
    trailing = options.use_dynamic_shifting or options.timestep_spacing == "trailing"
    default = "trailing" if trailing else "linspace"
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


def edm_grid(
    schedule: EDMSchedule, num_steps: int, options: SchedulerOptions, spacing: str | None
) -> HostTimestepGrid:
    """As EDMEulerScheduler places them: from sigma_max to sigma_min, by default karras.

    It starts from noise of variance sigma_max^2 + 1.
    """
    in_range("steps", num_steps, 1, MAX_CONTINUOUS_STEPS)
    curve = one_of(
        "timestep_spacing", spacing or options.sigma_schedule or "karras", SIGMA_SCHEDULES
    )
    noise = SIGMA_SCHEDULES[curve](schedule.sigma_max, schedule.sigma_min, num_steps)
    t = schedule.time_of(noise / schedule.sigma_data)
    alpha, sigma = schedule.alpha_sigma(t)
    ends_clean = options.final_sigmas_type == "zero"
    last = (1.0, 0.0) if ends_clean else (alpha[-1], sigma[-1])
    start = float(sigma[0]) * math.sqrt(1 + schedule.sigma_max**-2)
    return HostTimestepGrid(
        np.append(t, 0.0), np.append(alpha, last[0]), np.append(sigma, last[1]), start
    )
