"""What is learnt: each objective gives initial parameters and a loss over them.

Parameters are flat tables from dotted path to array, as `models.build.weights` gives them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxdiff.core.types import Array, Key

Params = dict[str, Array]
Metrics = dict[str, Array]


class Learner(NamedTuple):
    """An objective made concrete: how parameters begin, and how wrong they are on a batch."""

    # key -> parameters
    init: Callable[[Key[Array, ""]], Params]
    # (parameters, frozen weights, batch, key) -> (scalar to minimise, its named parts)
    loss: Callable[[Params, Any, dict[str, Array], Key[Array, ""]], tuple[Array, Metrics]]
    # parameters after an update -> the nearest allowed ones
    limit: Callable[[Params], Params] = lambda params: params
