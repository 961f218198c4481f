"""Cycles of kernels that were written by hand: the compiler's own schedule times their steps.

A TPU issues one bundle of instructions a cycle. What the compiler says of a kernel is how many
bundles one step of its grid has at most; stalls are not in it, nor are steps that end early.
"""

import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from jaxdiff.cli.planning.hlo import Kernel, Shape

_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")
_NAME = re.compile(r"%([\w.\-]+) = ")

Grids = dict[tuple[str, tuple[Shape, ...]], int]


class Cost(NamedTuple):
    """The cycles of all kernels together, and the names of those that nothing is known of."""

    cycles: float
    unknown: list[str]


def grids(program: core.Jaxpr) -> Grids:
    """Steps of every Pallas kernel in a traced program, by its name and its results' shapes.

    Sides of length one are left out, as the compiler does.
    """
    found: Grids = {}
    for equation in _equations(program):
        if equation.primitive.name == "pallas_call":
            results = tuple(_long(_shape(out)) for out in equation.outvars)
            name = str(equation.params["name"])
            found[name, results] = math.prod(equation.params["grid_mapping"].grid)
    return found


def schedules(folder: pathlib.Path) -> dict[str, int]:
    """Bundles of each operation whose schedule the compiler has written to `folder`."""
    found = {}
    for path in folder.rglob("*schedule-analysis_final_bundles.txt"):
        text = path.read_text(encoding="utf-8", errors="replace")
        bundles, name = _BUNDLES.search(text), _NAME.search(text)
        if bundles and name:
            found[name.group(1)] = int(bundles.group(1))
    return found


def cost(kernels: Sequence[Kernel], steps: Grids, bundles: Mapping[str, int], cores: int) -> Cost:
    """What `kernels` take on a chip whose `cores` share the steps of each."""
    cycles, unknown = 0.0, set()
    for kernel in kernels:
        count = steps.get((kernel.name, tuple(map(_long, kernel.results))))
        length = bundles.get(kernel.operation)
        if count is None or length is None:
            unknown.add(kernel.name)
        else:
            cycles += kernel.times * count * length / cores
    return Cost(cycles, sorted(unknown))


def _shape(atom: Any) -> Shape:
    return tuple(atom.aval.shape)


def _long(shape: Sequence[int]) -> Shape:
    return tuple(side for side in shape if side > 1)


def _equations(program: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for equation in program.eqns:
        yield equation
        if equation.primitive.name == "pallas_call":
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = _jaxpr(inner)
                if inner is not None:
                    yield from _equations(inner)


def _jaxpr(value: Any) -> core.Jaxpr | None:
    if isinstance(value, core.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, core.Jaxpr) else None
