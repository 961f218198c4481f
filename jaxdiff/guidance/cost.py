"""What a guidance rule costs: how often the network is asked about an image."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxdiff.diffusion.timesteps import Grid
from jaxdiff.guidance.rule import Guidance


def evaluations(rule: Guidance, grid: Grid, first: int, asked: Sequence[int]) -> int:
    """Evaluations of the network per image, in the steps from `first` on.

    `asked` says how often the sampler asks in each of them. Every time it is K for a rule's K
    streams where it is active, and one where it rests, if the plain model is one stream. An upper
    bound for rules that decide by what they see, as adaptive guidance does.
    """
    memory = rule.init(jnp.zeros((1, 1), jnp.float32))
    streams = len(rule.streams)
    resting = streams if rule.plain is None else 1
    return sum(
        times * (streams if rule.active(grid.level(first + i), memory) else resting)
        for i, times in enumerate(asked)
    )
