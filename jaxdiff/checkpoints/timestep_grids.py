"""Timestep grids: which noise levels a sampler visits, as diffusers' schedulers place them.

So the same number of steps means the same noise levels in both libraries. Grids are computed on the
host in float64.
"""

import numpy as np

from jaxdiff.checkpoints.continuous_grids import MAX_CONTINUOUS_STEPS, edm_grid, flow_grid
from jaxdiff.checkpoints.schedulers import CONVENTIONS, SchedulerConvention, SchedulerOptions
from jaxdiff.checkpoints.sigma_schedules import apply_sigma_schedule
from jaxdiff.core.errors import InputError
from jaxdiff.core.notation import split_options
from jaxdiff.core.types import Float, NDArray
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.denoising import alpha_sigma_from_edm
from jaxdiff.diffusion.grids import (
    SIGMA_SCHEDULES,
    SPACINGS,
    TIMESTEP_SPACINGS,
    HostTimestepGrid,
    TimestepGrid,
    check_timesteps,
    listed_timesteps,
)
from jaxdiff.diffusion.schedules import (
    MAX_SIGMA,
    EDMSchedule,
    FlowSchedule,
    Schedule,
    VPSchedule,
)
from jaxdiff.samplers.base import SAMPLERS


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
    if prediction_type in ("epsilon", "score") and levels.alpha[0] == 0:
        raise InputError(
            f"prediction_type: got {prediction_type!r} with a zero-terminal-SNR schedule or a "
            "flow, expected 'v_prediction' or 'sample': noise says nothing about the image there"
        )
    discrete = isinstance(schedule, VPSchedule)
    length = len(schedule.sigma_edm) if discrete else MAX_CONTINUOUS_STEPS
    return TimestepGrid.from_host(levels, length=length)


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
        grid = flow_grid(schedule, steps, options, spacing, num_tokens)
    elif isinstance(schedule, EDMSchedule):
        grid = edm_grid(schedule, steps, options, spacing)
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


def convention_of(sampler: str) -> SchedulerConvention:
    """How diffusers' scheduler of this sampler, described with or without options, does it."""
    name, _ = split_options("sampler", sampler)
    return CONVENTIONS.get(one_of("sampler", name, SAMPLERS), SchedulerConvention())


def _vp_grid(
    schedule: VPSchedule,
    num_steps: int,
    convention: SchedulerConvention,
    options: SchedulerOptions,
    spacing: str | None,
) -> HostTimestepGrid:
    """As the schedulers of discrete levels place them."""
    table = schedule.sigma_edm
    in_range("steps", num_steps, 1, len(table))
    times, sigma_schedule = _choose(spacing, convention, options)
    if convention.in_sigma_space or sigma_schedule:
        table = np.where(np.isinf(table), MAX_SIGMA, table)
    levels = len(table)
    if convention.clips_lambda:
        levels = int(np.sum(table <= np.exp(-options.lambda_min_clipped)))
    listed = listed_timesteps(spacing)
    if listed is None:
        t = _times(times, levels, num_steps, convention, options)
    else:
        t = check_timesteps(listed, levels, num_steps)
    sigma_edm = interpolate(table, t)
    if sigma_schedule:
        t, sigma_edm = apply_sigma_schedule(sigma_schedule, schedule, table, sigma_edm, convention)
    final = table[0] if _ends_at_sigma_min(convention, options) else 0.0
    alpha, sigma = alpha_sigma_from_edm(np.append(sigma_edm, final))
    below_one = convention.carries_x_over_alpha and times != "leading"
    return HostTimestepGrid(np.append(t, 0.0), alpha, sigma, float(sigma[0]) if below_one else 1.0)


def _choose(
    spacing: str | None, convention: SchedulerConvention, options: SchedulerOptions
) -> tuple[str, str | None]:
    """The timestep spacing, and the sigma schedule that replaces it if there is one."""
    asked = None if convention.fixed_spacing else options.timestep_spacing
    times = asked or convention.spacing
    if spacing is None or listed_timesteps(spacing) is not None:
        return times, options.sigma_schedule if convention.in_sigma_space and not spacing else None
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


def interpolate(table: Float[NDArray, "T"], t: Float[NDArray, "n"]) -> Float[NDArray, "n"]:
    """`table` at times 0 <= t <= T-1, linear between two levels."""
    low = np.floor(t).astype(np.int64)
    part = t - low
    # On a level its right neighbour must not enter: 0 * infinity is not 0.
    high = np.where(part > 0, low + 1, low)
    rise = np.where(part > 0, table[high], 0) - np.where(part > 0, table[low], 0)
    return table[low] + part * rise


def _ends_at_sigma_min(convention: SchedulerConvention, options: SchedulerOptions) -> bool:
    """Whether the last step ends at the smallest sigma of the schedule instead of at 0."""
    if convention.final_sigma == "set_alpha_to_one":
        chosen = options.set_alpha_to_one
        return not (convention.set_alpha_to_one_default if chosen is None else chosen)
    if convention.final_sigma == "sigma_min":
        return True
    return (
        convention.final_sigma == "final_sigmas_type" and options.final_sigmas_type == "sigma_min"
    )


def lcm_timesteps(T: int, n: int, teacher: int) -> Float[NDArray, "n"]:
    """n of the times k T / teacher - 1 that a consistency model was trained at (2310.04378)."""
    if n > teacher:
        raise InputError(f"steps: got {n}, expected at most the {teacher} of the model's teacher")
    at = np.arange(teacher, 0, -1) * float(T // teacher) - 1
    return at[np.floor(np.linspace(0, teacher, n, endpoint=False)).astype(np.int64)]
