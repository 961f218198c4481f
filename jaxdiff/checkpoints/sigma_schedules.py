"""Sigma schedules in place of spaced timesteps, as diffusers' discrete schedulers use them."""

import numpy as np

from jaxdiff.checkpoints.schedulers import SchedulerConvention
from jaxdiff.core.types import NDArray
from jaxdiff.diffusion.grids import SIGMA_SCHEDULES
from jaxdiff.diffusion.schedules import VPSchedule


def apply_sigma_schedule(
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
    # So do these in diffusers; elsewhere the network gets the fractional timestep.
    if sigma_schedule == "karras" and _rounds_karras(convention, schedule):
        t = np.round(t)
    elif convention.integer_timesteps and convention.in_sigma_space:
        t = np.floor(t)
    return t, sigma_edm


def _rounds_karras(convention: SchedulerConvention, schedule: VPSchedule) -> bool:
    cosine = schedule.beta_schedule in ("squaredcos_cap_v2", "cosine")
    return convention.rounds_karras and (convention.rounds_karras_of_cosine or not cosine)
