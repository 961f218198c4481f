"""The real training step as a program for chips that are not here."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxdiff.core.types import PyTree
from jaxdiff.parallel.mesh import check_batch_size, make_mesh, num_batch_shards
from jaxdiff.planning.abstract_training import AbstractTraining, abstract_training
from jaxdiff.planning.compiling import Compiled, compile_traced
from jaxdiff.planning.max_batch import largest_batch
from jaxdiff.planning.report import Plan, Planner
from jaxdiff.planning.topology import Topology
from jaxdiff.planning.topology import devices as chips_of
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.flops import gradient_flops
from jaxdiff.training.program import make_program
from jaxdiff.training.state import TrainState


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
    check_batch_size(batch_size // config.gradient_accumulation_steps, mesh)
    program = make_program(config, parts.learner, parts.frozen, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = program.step.trace(program.state, parts.frozen, parts.batch(batch_size), key)
    held = _held(program.state, program.state_places, parts.frozen, program.frozen_places)
    return Step(traced, held, num_batch_shards(mesh) * config.gradient_accumulation_steps)


def training_planner(config: TrainConfig, *, largest: bool) -> Planner:
    """Plans the step of `config`, and with `largest` the largest batch; raises InputError."""
    parts = abstract_training(config)

    def plan(topology: Topology) -> Plan:
        chips = chips_of(topology)

        def compiled(batch_size: int) -> Compiled:
            step = trace_step(config, parts, chips, batch_size)
            return compile_traced(step.traced, topology)

        step = trace_step(config, parts, chips, config.batch_size)
        first = compile_traced(step.traced, topology)
        fits = None
        if largest:
            known, limit = {config.batch_size: first.total}, topology.chip.hbm
            fits = largest_batch(lambda n: compiled(n).total, known, limit, step.ways)
        return Plan(
            topology=topology,
            batch_size=config.batch_size,
            compiled=first,
            model_flops=step_flops(parts, config.batch_size) / topology.chips,
            held=step.held,
            largest=fits,
        )

    return plan


def step_flops(parts: AbstractTraining, batch_size: int) -> float:
    """Model FLOPs of one step, see `flops`: one picture's times their number."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = (parts.learner.shapes, parts.frozen, parts.batch(1), key)
    return batch_size * gradient_flops(parts.learner.loss, *shapes)


def _held(state: TrainState, where: TrainState, frozen: PyTree, frozen_where: PyTree) -> Any:
    return {
        "weights": _bytes(state.params, where.params),
        "ema": _bytes((state.ema, state.profiles), (where.ema, where.profiles)),
        "optimiser": _bytes(state.opt_state, where.opt_state),
        "frozen": _bytes(frozen, frozen_where),
    }


def _bytes(tree: PyTree, shardings: PyTree) -> float:
    """Of each device's part of the arrays in `tree`."""

    def size(leaf: Any, where: Any) -> int:
        return math.prod(where.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize

    return float(sum(jax.tree.leaves(jax.tree.map(size, tree, shardings))))
