"""Objectives as training tasks: initial parameters and a loss.

Parameters are flat dicts from dotted path to array, as `models.build.param_dict` gives them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxdiff.core.types import Array, Key, NDArray
from jaxdiff.parallel.sharding import ANY, Rules

Params = dict[str, Array]
HostParams = dict[str, NDArray]  # parameters on the host
Metrics = dict[str, Array]


def _unchanged(frozen: Any, step: Array) -> Any:
    return frozen


def _no_metrics(
    params: Params, frozen: Any, batch: dict[str, Array], key: Key[Array, "..."]
) -> Metrics:
    return {}


class TrainingTask(NamedTuple):
    """An objective with its networks: initial parameters, and the loss of a batch."""

    # shapes and dtypes of the parameters
    shapes: Params
    # seed -> path and initial value of each parameter, one at a time
    init: Callable[[int], Iterator[tuple[str, NDArray]]]
    # (parameters, frozen weights, batch, key or keys of the samples)
    # -> (scalar loss, metrics)
    loss: Callable[[Params, Any, dict[str, Array], Key[Array, "..."]], tuple[Array, Metrics]]
    # updated parameters -> the nearest allowed ones
    project_params: Callable[[Params], Params] = lambda params: params
    # sharding rules of the parameters
    rules: Rules = ANY
    # metrics of a validation batch, where there are more than the loss
    eval_metrics: Callable[[Params, Any, dict[str, Array], Key[Array, "..."]], Metrics] = (
        _no_metrics
    )
    # (frozen weights, step) -> the `frozen` argument of the loss at that step
    frozen_at_step: Callable[[Any, Array], Any] = _unchanged
