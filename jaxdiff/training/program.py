"""A training on a mesh: its initial state, where that lies, and its compiled step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxdiff.core.types import Array, PyTree
from jaxdiff.nn.remat import regathering
from jaxdiff.parallel.mesh import FSDP, device_put_global
from jaxdiff.parallel.sharding import (
    all_gather_fsdp,
    infer_shardings,
    optimizer_state_shardings,
    shardings,
)
from jaxdiff.training.config import EMAConfig, OptimiserConfig
from jaxdiff.training.optimiser import (
    is_constant,
    learning_rate,
    lr_multipliers,
    make_optimiser,
)
from jaxdiff.training.step import (
    TrainingTask,
    TrainState,
    compile_step,
    initial_state,
    make_step,
    stop_gradients_for,
)


class TrainProgram(NamedTuple):
    """A training on a mesh: its initial state, and its compiled step."""

    init: Callable[[int], TrainState]  # seed -> the state before the first step, on the mesh
    state_shapes: Any  # shapes and dtypes of the state
    state_shardings: Any  # of the state
    frozen_shardings: PyTree  # of the frozen weights
    step: Any  # (state, frozen, batch, base key) -> (state, metrics), under jit


def make_program(
    task: TrainingTask,
    frozen: PyTree,
    mesh: Mesh,
    *,
    steps: int,
    optimiser: OptimiserConfig = OptimiserConfig(),  # noqa: B008 - it is frozen
    ema: EMAConfig = EMAConfig(),  # noqa: B008
    gradient_accumulation_steps: int = 1,
    reshard_after_forward: bool = False,
) -> TrainProgram:
    """The program of a training of `steps` steps; `frozen` are frozen weights, or their shapes.

    With `reshard_after_forward` blocks with rematerialisation gather their parameters along "fsdp"
    in the forward pass, and again in the backward pass (ZeRO stage 3, 1910.02054). Raises
    InputError for learning rate multipliers that match no weight.
    """
    multipliers = lr_multipliers(task.shapes, optimiser)
    frozen_paths = {path for path, value in multipliers.items() if not value or is_constant(path)}
    transform = make_optimiser(optimiser, steps, multipliers)
    new_state = functools.partial(initial_state, optimiser=transform, power_stds=ema.power_stds)
    state_shapes = jax.eval_shape(new_state, task.shapes)
    state_shardings: Any = optimizer_state_shardings(state_shapes, task.shapes, task.rules, mesh)
    frozen_shardings = infer_shardings(frozen, mesh)
    param_shardings = shardings(task.shapes, task.rules, mesh)

    def init(seed: int) -> TrainState:
        params = {
            path: device_put_global(array, param_shardings[path]) for path, array in task.init(seed)
        }
        return jax.jit(new_state, out_shardings=state_shardings)(params)

    def gathered(function: Callable[..., Any], parts: PyTree) -> Callable[..., Any]:
        """`function` of weights that are sharded as in `parts`."""
        if mesh.shape[FSDP] == 1:
            return function
        return lambda weights, *others: function(all_gather_fsdp(weights, parts), *others)

    def gather(path: str, weight: Array) -> Array:
        parts = {path: param_shardings[path]}
        return all_gather_fsdp({path: weight}, parts, reduce_at_once=True)[path]

    def loss_of_shards(params: dict[str, Array], *others: Any) -> Any:
        whole = {path: gather(path, weight) for path, weight in params.items()}
        with regathering(whole, params, gather):
            return task.loss(whole, *others)

    step = make_step(
        stop_gradients_for(
            loss_of_shards if reshard_after_forward else gathered(task.loss, param_shardings),
            frozen_paths,
        ),
        transform,
        learning_rate(optimiser, steps),
        ema,
        task.project_params,
        gradient_accumulation_steps,
        gathered(task.frozen_at_step, frozen_shardings),
    )
    compiled = compile_step(
        step, mesh, state_shardings, frozen_shardings, transformer=task.transformer
    )
    return TrainProgram(init, state_shapes, state_shardings, frozen_shardings, compiled)


# Random numbers with a key per sample, so that they do not depend on how a batch is split. A key
# argument is either one key, from which sample i gets fold_in(key, i), or one key per sample.
