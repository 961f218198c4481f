"""`train.py CONFIG --plan TOPOLOGY ...`: what a step takes on chips that are not here."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxdiff.planning.abstract import abstract_training
from jaxdiff.planning.compilers import prepare
from jaxdiff.planning.compiling import Compiled, compile_traced
from jaxdiff.planning.largest import largest_batch
from jaxdiff.planning.report import Plan, table
from jaxdiff.planning.topology import Topology, devices, parse
from jaxdiff.planning.training import step_flops, trace_step
from jaxdiff.training.config import TrainConfig

Planner = Callable[[Topology], Plan]


def plan_training(
    config: TrainConfig, names: Sequence[str], *, largest: bool, as_json: bool
) -> None:
    """Print what a step of `config` takes on each of the topologies; raises InputError."""
    parts = abstract_training(config)

    def plan(topology: Topology) -> Plan:
        chips = devices(topology)

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

    plan_all(names, plan, as_json=as_json)


def plan_all(names: Sequence[str], plan: Planner, *, as_json: bool) -> None:
    """Print `plan` of each topology as soon as it is there, or all of them as one JSON object."""
    topologies = [parse(name) for name in names]
    jax.config.update("jax_platforms", "cpu")
    found: list[dict[str, Any]] = []
    for topology in topologies:
        prepare(topology.chip)
        print(f"plan: compiling for {topology.title}", file=sys.stderr)
        made = plan(topology)
        found.append(made.to_json())
        if not as_json:
            print(table(made), flush=True)
    if as_json:
        print(json.dumps({"plans": found}))
