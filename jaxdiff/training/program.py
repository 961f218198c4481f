"""A training as a compiled step, with the shardings of its state and frozen weights."""

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
from jaxdiff.training.objectives import TrainingTask
from jaxdiff.training.optimiser import learning_rate, lr_multipliers, make_optimiser
from jaxdiff.training.state import TrainState, initial_state
from jaxdiff.training.step import compile_step, make_step, stop_gradients_for


class TrainProgram(NamedTuple):
    """Initialisation and step of a training on a mesh."""

    init: Callable[[PyTree], TrainState]  # parameters -> initial state
    state_shapes: Any  # shapes and dtypes of the state
    state_shardings: Any  # of the state
    frozen_shardings: PyTree  # of the frozen weights
    step: Any  # (state, frozen, batch, base key) -> (state, metrics), under jit


def make_program(
    config: TrainConfig, task: TrainingTask, frozen: PyTree, mesh: Mesh
) -> TrainProgram:
    """The program of `config`; `frozen` are the loss's frozen weights, or their shapes."""
    multipliers = lr_multipliers(task.shapes, config.optimiser)
    frozen_paths = {path for path, value in multipliers.items() if not value}
    transform = make_optimiser(config.optimiser, config.steps, multipliers)
    init = functools.partial(initial_state, optimiser=transform, power_stds=config.ema.power_stds)
    state_shapes = jax.eval_shape(init, task.shapes)
    state_shardings: Any = optimizer_state_shardings(state_shapes, task.shapes, task.rules, mesh)
    frozen_shardings = infer_shardings(frozen, mesh)
    param_shardings = shardings(task.shapes, task.rules, mesh)

    def loss(params: PyTree, *others: Any) -> Any:
        return task.loss(all_gather_fsdp(params, param_shardings), *others)

    def frozen_at_step(frozen: PyTree, step: Array) -> PyTree:
        return task.frozen_at_step(all_gather_fsdp(frozen, frozen_shardings), step)

    step_function = make_step(
        stop_gradients_for(loss, frozen_paths),
        transform,
        learning_rate(config.optimiser, config.steps),
        config.ema,
        task.project_params,
        config.gradient_accumulation_steps,
        frozen_at_step,
    )
    step = compile_step(step_function, mesh, state_shardings, frozen_shardings)
    return TrainProgram(init, state_shapes, state_shardings, frozen_shardings, step)
