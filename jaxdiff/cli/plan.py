"""`--plan TOPOLOGY ...` of train.py and generate.py: compile for devices that are absent."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jaxdiff.cli.arguments import parse
from jaxdiff.planning.compilers import configure_compiler
from jaxdiff.planning.report import Planner, format_plan
from jaxdiff.planning.sampled_model import SamplingOptions
from jaxdiff.planning.sampling import sampling_planner
from jaxdiff.planning.topology import parse_topology
from jaxdiff.planning.training import training_planner
from jaxdiff.training.config import TrainConfig


def plan_training(
    config: TrainConfig, names: Sequence[str], *, largest: bool, as_json: bool
) -> None:
    """Print the plan of a training step on each topology; raises InputError."""
    show_plans(names, training_planner(config, largest=largest), as_json=as_json)


def plan_sampling(arguments: Sequence[str]) -> None:
    """Parse `arguments` and print the plan of generation on each topology."""
    options = parse(SamplingOptions, arguments, prog="generate.py")
    show_plans(options.plan, sampling_planner(options), as_json=options.json)


def show_plans(names: Sequence[str], plan: Planner, *, as_json: bool) -> None:
    """Print the plan of each topology as soon as it is ready, or all as one JSON object."""
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
