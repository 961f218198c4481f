"""A training as a compiled step and the places of all that it reads and changes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxdiff.core.types import Array, PyTree
from jaxdiff.parallel.sharding import (
    all_gather_fsdp,
    infer_shardings,
    optimizer_state_shardings,
    shardings,
)
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.objectives import Learner
from jaxdiff.training.optimiser import factors, learning_rate, optimiser
from jaxdiff.training.state import TrainState, initial_state
from jaxdiff.training.step import compile_step, hold, make_step


class Program(NamedTuple):
    """How a training begins and goes on, on a mesh."""

    begin: Callable[[PyTree], TrainState]  # of the parameters
    state: Any  # shapes and dtypes of the state
    state_places: Any  # its shardings
    frozen_places: PyTree  # those of the frozen weights
    step: Any  # (state, frozen, batch, base key) -> (state, metrics), under jit


def make_program(config: TrainConfig, learner: Learner, frozen: PyTree, mesh: Mesh) -> Program:
    """The program of `config`; `frozen` is what the learner's loss reads, or its shapes."""
    factor = factors(learner.shapes, config.optimiser)
    held = {path for path, value in factor.items() if not value}
    transform = optimiser(config.optimiser, config.steps, factor)
    begin = functools.partial(initial_state, optimiser=transform, widths=config.ema.power_stds)
    state = jax.eval_shape(begin, learner.shapes)
    state_places: Any = optimizer_state_shardings(state, learner.shapes, learner.rules, mesh)
    frozen_places = infer_shardings(frozen, mesh)
    parts = shardings(learner.shapes, learner.rules, mesh)

    def loss(params: PyTree, *others: Any) -> Any:
        return learner.loss(all_gather_fsdp(params, parts), *others)

    def at(frozen: PyTree, step: Array) -> PyTree:
        return learner.at(all_gather_fsdp(frozen, frozen_places), step)

    pure = make_step(
        hold(loss, held),
        transform,
        learning_rate(config.optimiser, config.steps),
        config.ema,
        learner.limit,
        config.gradient_accumulation_steps,
        at,
    )
    step = compile_step(pure, mesh, state_places, frozen_places)
    return Program(begin, state, state_places, frozen_places, step)
