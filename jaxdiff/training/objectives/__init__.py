"""What is learnt: each objective gives initial parameters and a loss over them.

Parameters are flat tables from dotted path to array, as `models.build.param_dict` gives them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxdiff.core.types import Array, Key, NDArray
from jaxdiff.parallel.sharding import ANY, Rules

Params = dict[str, Array]
Whole = dict[str, NDArray]  # parameters that have been fetched from the devices
Metrics = dict[str, Array]


def _as_ever(frozen: Any, step: Array) -> Any:
    return frozen


def _nothing(
    params: Params, frozen: Any, batch: dict[str, Array], key: Key[Array, "..."]
) -> Metrics:
    return {}


class Learner(NamedTuple):
    """An objective made concrete: how parameters begin, and how wrong they are on a batch."""

    # parameters as shapes and dtypes
    shapes: Params
    # seed -> path and initial value of each parameter, one at a time
    init: Callable[[int], Iterator[tuple[str, NDArray]]]
    # (parameters, frozen weights, batch, key or keys of the samples)
    # -> (scalar to minimise, its named parts)
    loss: Callable[[Params, Any, dict[str, Array], Key[Array, "..."]], tuple[Array, Metrics]]
    # parameters after an update -> the nearest allowed ones
    limit: Callable[[Params], Params] = lambda params: params
    # how parameters are split over devices
    rules: Rules = ANY
    # what is measured on validation pictures where that is more than the loss
    measure: Callable[[Params, Any, dict[str, Array], Key[Array, "..."]], Metrics] = _nothing
    # (frozen weights, steps so far) -> what the loss is given in their place at that step
    at: Callable[[Any, Array], Any] = _as_ever
