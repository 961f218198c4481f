"""The real training step as a program for chips that are not here."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxdiff.cli.planning.abstract import AbstractTraining
from jaxdiff.cli.planning.flops import gradient_flops
from jaxdiff.core.types import PyTree
from jaxdiff.parallel.mesh import check_batch_size, make_mesh, ways
from jaxdiff.parallel.rules import sharded_like, split_any
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.optimiser import learning_rate, optimiser
from jaxdiff.training.state import TrainState, initial_state
from jaxdiff.training.step import compile_step, make_step


class Step(NamedTuple):
    """A step on one batch size, traced."""

    traced: Any  # what `compile_traced` takes
    held: dict[str, float]  # bytes that each chip holds from step to step
    ways: int  # batch sizes are multiples of it


def trace_step(
    config: TrainConfig, parts: AbstractTraining, devices: Sequence[Any], batch_size: int
) -> Step:
    """The step that `train.py` runs, on `devices`; InputError for a mesh they do not make."""
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)
    check_batch_size(batch_size // config.accumulate, mesh)
    learner, transform = parts.learner, optimiser(config.optimiser, config.steps)
    begin = functools.partial(initial_state, optimiser=transform)
    state = jax.eval_shape(begin, learner.shapes)
    where: Any = sharded_like(state, learner.shapes, learner.rules, mesh)
    frozen = split_any(parts.frozen, mesh)
    pure = make_step(
        learner.loss,
        transform,
        learning_rate(config.optimiser, config.steps),
        config.ema_decay,
        learner.limit,
        config.accumulate,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = compile_step(pure, mesh, where, frozen)
    traced = step.trace(state, parts.frozen, parts.batch(batch_size), key)
    return Step(traced, _held(state, where, parts.frozen, frozen), ways(mesh) * config.accumulate)


def step_flops(parts: AbstractTraining, batch_size: int) -> float:
    """Model FLOPs of one step, see `flops`: one picture's times their number."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = (parts.learner.shapes, parts.frozen, parts.batch(1), key)
    return batch_size * gradient_flops(parts.learner.loss, *shapes)


def _held(state: TrainState, where: TrainState, frozen: PyTree, frozen_where: PyTree) -> Any:
    return {
        "weights": _bytes(state.params, where.params),
        "ema": _bytes(state.ema, where.ema),
        "optimiser": _bytes(state.opt_state, where.opt_state),
        "frozen": _bytes(frozen, frozen_where),
    }


def _bytes(tree: PyTree, shardings: PyTree) -> float:
    """Of each device's part of the arrays in `tree`."""

    def size(leaf: Any, where: Any) -> int:
        return math.prod(where.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize

    return float(sum(jax.tree.leaves(jax.tree.map(size, tree, shardings))))
