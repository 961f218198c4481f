"""Number of function evaluations (NFE) of a guidance rule."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxdiff.diffusion.timesteps import NoiseLevel, TimestepGrid
from jaxdiff.guidance.base import Guidance


def nfe(rule: Guidance, grid: TimestepGrid, first: int, calls_per_step: Sequence[int]) -> int:
    """Evaluations of the network per image, in the steps from `first` on.

    `calls_per_step` has the sampler's denoiser calls in each of them. A call costs K evaluations
    for a rule's K streams where it guides, one where it does not, if the conditional model is one
    stream, and none where the velocity is zero. An upper bound for rules that depend on the
    outputs, as adaptive guidance does.
    """
    state = rule.init_state(jnp.zeros((1, 1), jnp.float32))
    streams = len(rule.streams)
    resting = streams if rule.cond_stream is None else 1

    def at(level: NoiseLevel) -> int:
        if rule.is_zero_velocity(level):
            return 0
        return streams if rule.is_guided(level, state) else resting

    return sum(times * at(grid.level(first + i)) for i, times in enumerate(calls_per_step))


def phase_switches(rule: Guidance, grid: TimestepGrid, first: int, last: int) -> list[int]:
    """The steps among first, ..., last - 1, counted from `first`, that begin another phase."""
    phases = [int(rule.schedule_phase(grid.level(i))) for i in range(first, last)]
    return [i for i in range(1, len(phases)) if phases[i] != phases[i - 1]]
