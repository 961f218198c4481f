"""What a guidance rule costs: how often the network is asked about an image."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxdiff.diffusion.timesteps import NoiseLevel, TimestepGrid
from jaxdiff.guidance.rule import Guidance


def evaluations(rule: Guidance, grid: TimestepGrid, first: int, asked: Sequence[int]) -> int:
    """Evaluations of the network per image, in the steps from `first` on.

    `asked` says how often the sampler asks in each of them. Every time it is K for a rule's K
    streams where it is active, one where it rests, if the plain model is one stream, and none where
    it stands still. An upper bound for rules that decide by what they see, as adaptive guidance
    does.
    """
    memory = rule.init(jnp.zeros((1, 1), jnp.float32))
    streams = len(rule.streams)
    resting = streams if rule.plain is None else 1

    def at(level: NoiseLevel) -> int:
        if rule.still(level):
            return 0
        return streams if rule.active(level, memory) else resting

    return sum(times * at(grid.level(first + i)) for i, times in enumerate(asked))


def changes(rule: Guidance, grid: TimestepGrid, first: int, last: int) -> list[int]:
    """Those of the steps first, ..., last - 1, counted from `first`, that begin another phase."""
    phases = [int(rule.phase(grid.level(i))) for i in range(first, last)]
    return [i for i in range(1, len(phases)) if phases[i] != phases[i - 1]]
