"""Number of function evaluations (NFE) of a guidance rule."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxdiff.core.types import Array, Int
from jaxdiff.diffusion.denoising import NoiseLevel
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.guidance.base import CONDITIONAL, GUIDED, SKIP, Guidance


def nfe(rule: Guidance, grid: TimestepGrid, first: int, calls_per_step: Sequence[int]) -> int:
    """Evaluations of the network for the image of a grid, in the steps from `first` on.

    `calls_per_step` has the sampler's denoiser calls in each of them. A call costs K evaluations
    for a rule's K streams where it guides, one where it does not, if the conditional model is one
    stream, and none where the velocity is zero. An upper bound for rules that depend on the
    outputs, as adaptive guidance does.
    """
    state, streams = rule.init_state(jnp.zeros((1, 1), jnp.float32)), len(rule.streams)
    cost = {SKIP: 0, CONDITIONAL: streams if rule.cond_stream is None else 1, GUIDED: streams}
    modes = [_only(rule.mode(_level(grid, first + i), state)) for i in range(len(calls_per_step))]
    return sum(times * cost[mode] for times, mode in zip(calls_per_step, modes, strict=True))


def phase_switches(rule: Guidance, grid: TimestepGrid, first: int, last: int) -> list[int]:
    """The steps among first, ..., last - 1, counted from `first`, that begin another phase."""
    phases = [_only(rule.phase(_level(grid, i))) for i in range(first, last)]
    return [i for i in range(1, len(phases)) if phases[i] != phases[i - 1]]


def _level(grid: TimestepGrid, step: int) -> NoiseLevel:
    return grid.level(jnp.array([step]), 1)


def _only(value: int | Int[Array, "1"]) -> int:
    """The number of the one image."""
    return value if isinstance(value, int) else int(value[0])
