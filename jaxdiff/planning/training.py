"""Plans of the training step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxdiff.core.types import PyTree
from jaxdiff.experiments.experiment import Wiring
from jaxdiff.experiments.train import wire
from jaxdiff.parallel.mesh import check_batch_size, make_mesh, num_batch_shards
from jaxdiff.planning.compiling import CompiledProgram, compile_traced
from jaxdiff.planning.max_batch import max_batch_size
from jaxdiff.planning.published_models import PUBLISHED
from jaxdiff.planning.report import Plan, Planner
from jaxdiff.planning.topology import Topology
from jaxdiff.planning.topology import topology_devices as chips_of
from jaxdiff.profiling.flops import gradient_flops
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.step import TrainState


class TracedStep(NamedTuple):
    """The traced step at one batch size."""

    traced: Any  # the argument of `compile_traced`
    state_bytes: dict[str, float]  # bytes per chip that persist between steps
    batch_multiple: int  # batch sizes are multiples of it


def trace_step(
    config: TrainConfig, training: Wiring, devices: Sequence[Any], batch_size: int
) -> TracedStep:
    """The step that `train.py` runs, on `devices`; InputError for a mesh they do not make."""
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)
    check_batch_size(batch_size // config.gradient_accumulation_steps, mesh)
    program = training.program(config, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = program.step.trace(
        program.state_shapes, training.frozen, training.batch(batch_size), key
    )
    state_bytes = _state_bytes(
        program.state_shapes, program.state_shardings, training.frozen, program.frozen_shardings
    )
    return TracedStep(
        traced, state_bytes, num_batch_shards(mesh) * config.gradient_accumulation_steps
    )


def training_planner(config: TrainConfig, *, largest: bool) -> Planner:
    """Plans the step of `config`, and with `largest` the largest batch; raises InputError."""
    training = wire(config, PUBLISHED)
    transformer = training.task.transformer

    def plan(topology: Topology) -> Plan:
        devices = chips_of(topology)

        def compiled(batch_size: int) -> CompiledProgram:
            step = trace_step(config, training, devices, batch_size)
            return compile_traced(step.traced, topology, transformer=transformer)

        model_flops = step_flops(training, config.batch_size) / topology.num_chips
        step = trace_step(config, training, devices, config.batch_size)
        first = compile_traced(step.traced, topology, transformer=transformer)
        max_batch = None
        if largest:
            measured, limit = {config.batch_size: first.total}, topology.chip.hbm
            max_batch = max_batch_size(
                lambda n: compiled(n).total, measured, limit, step.batch_multiple
            )
        return Plan(
            topology=topology,
            batch_size=config.batch_size,
            compiled=first,
            model_flops=model_flops,
            state_bytes=step.state_bytes,
            max_batch_size=max_batch,
        )

    return plan


def step_flops(training: Wiring, batch_size: int) -> float:
    """Model FLOPs of one step (see `flops`): those of one image times the batch size."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = (training.task.shapes, training.frozen, training.batch(1), key)
    return batch_size * gradient_flops(training.task.loss, *shapes)


def _state_bytes(
    state: TrainState, shardings: TrainState, frozen: PyTree, frozen_shardings: PyTree
) -> Any:
    return {
        "weights": _bytes(state.params, shardings.params),
        "ema": _bytes((state.ema, state.power_ema), (shardings.ema, shardings.power_ema)),
        "optimiser": _bytes(state.opt_state, shardings.opt_state),
        "frozen": _bytes(frozen, frozen_shardings),
    }


def _bytes(tree: PyTree, shardings: PyTree) -> float:
    """Bytes of each device's shards of the arrays in `tree`."""

    def size(leaf: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize

    return float(sum(jax.tree.leaves(jax.tree.map(size, tree, shardings))))
