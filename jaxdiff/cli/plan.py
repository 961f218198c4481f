"""`--plan TOPOLOGY ...` of train.py and generate.py: what a program takes on absent chips."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import tyro

from jaxdiff.planning.compilers import configure_compiler
from jaxdiff.planning.report import Planner, format_plan
from jaxdiff.planning.sampling import SamplingOptions, sampling_planner
from jaxdiff.planning.topology import parse_topology
from jaxdiff.planning.training import training_planner
from jaxdiff.training.config import TrainConfig


def plan_training(
    config: TrainConfig, names: Sequence[str], *, largest: bool, as_json: bool
) -> None:
    """Print what a step of `config` takes on each of the topologies; raises InputError."""
    show_plans(names, training_planner(config, largest=largest), as_json=as_json)


def plan_sampling(arguments: Sequence[str]) -> None:
    """Parse `arguments` and print the plans of the sampling loop; raises InputError."""
    options = tyro.cli(SamplingOptions, args=arguments, prog="generate.py")
    show_plans(options.plan, sampling_planner(options), as_json=options.json)


def show_plans(names: Sequence[str], plan: Planner, *, as_json: bool) -> None:
    """Print the plan of each topology as soon as it is there, or all of them as one JSON object."""
    topologies = [parse_topology(name) for name in names]
    jax.config.update("jax_platforms", "cpu")
    found: list[dict[str, Any]] = []
    for topology in topologies:
        configure_compiler(topology.chip)
        print(f"plan: compiling for {topology.title}", file=sys.stderr)
        made = plan(topology)
        found.append(made.to_json())
        if not as_json:
            print(format_plan(made), flush=True)
    if as_json:
        print(json.dumps({"plans": found}))
