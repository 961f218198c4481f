"""Cycles of kernels that were written by hand: the compiler's own schedule times their steps.

A TPU issues one bundle of instructions a cycle. What the compiler says of a kernel is how many
bundles one step of its grid has at most; stalls are not in it, nor are steps that end early. The
blocks of its arrays are fetched and written meanwhile, at the memory's speed, each when the step
before had another: a kernel takes as long as the longer of both.
"""

import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxdiff.cli.planning.hlo import Kernel, Shape

_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")
_NAME = re.compile(r"%([\w.\-]+) = ")


class Grid(NamedTuple):
    """What a kernel does in one call."""

    steps: int
    moved: float  # bytes between the chip's memory and the kernel


Grids = dict[tuple[str, tuple[Shape, ...]], Grid]


class Cost(NamedTuple):
    """The cycles of all kernels together, and the names of those that nothing is known of."""

    cycles: float
    unknown: list[str]


def grids(program: core.Jaxpr) -> Grids:
    """The grid of every Pallas kernel in a traced program, by its name and its results' shapes.

    Sides of length one are left out, as the compiler does.
    """
    found: Grids = {}
    for equation in _equations(program):
        if equation.primitive.name == "pallas_call":
            results = tuple(_long(_shape(out)) for out in equation.outvars)
            name = str(equation.params["name"])
            found[name, results] = _grid(equation.params["grid_mapping"])
    return found


def _grid(mapping: Any) -> Grid:
    steps = [np.asarray(axis, np.int32).ravel() for axis in np.indices(mapping.grid)]
    moved = 0.0
    for block in mapping.block_mappings:
        size = math.prod(getattr(side, "block_size", side or 1) for side in block.block_shape)
        place = jax.vmap(core.jaxpr_as_fun(block.index_map_jaxpr))
        places = np.stack([np.broadcast_to(axis, steps[0].shape) for axis in place(*steps)])
        fetched = 1 + np.count_nonzero((np.diff(places) != 0).any(0))
        moved += fetched * size * block.array_aval.dtype.itemsize
    return Grid(math.prod(mapping.grid), moved)


def schedules(folder: pathlib.Path) -> dict[str, int]:
    """Bundles of each operation whose schedule the compiler has written to `folder`.

    A file is named for the operation that it is of; that of the whole program names others inside.
    """
    found = {}
    for path in folder.rglob("*schedule-analysis_final_bundles.txt"):
        text = path.read_text(encoding="utf-8", errors="replace")
        bundles, name = _BUNDLES.search(text), _NAME.search(text)
        if bundles and name and f"-{name.group(1)}-" in path.name:
            found[name.group(1)] = int(bundles.group(1))
    return found


def cost(
    kernels: Sequence[Kernel], grids: Grids, bundles: Mapping[str, int], cores: int, speed: float
) -> Cost:
    """What `kernels` take on a chip whose `cores` share the steps of each.

    `speed` is the bytes that its memory moves in a cycle. Of calls of one kernel the compiler
    schedules some anew and takes the others from those: these have the longest schedule found.
    """
    lengths: dict[tuple[str, tuple[Shape, ...]], int] = {}
    for kernel in kernels:
        if found := bundles.get(kernel.operation):
            lengths[_key(kernel)] = max(found, lengths.get(_key(kernel), 0))
    cycles, unknown = 0.0, set()
    for kernel in kernels:
        grid = grids.get(_key(kernel))
        length = bundles.get(kernel.operation, lengths.get(_key(kernel)))
        if grid is None or length is None:
            unknown.add(kernel.name)
        else:
            cycles += kernel.times * max(grid.steps * length / cores, grid.moved / speed)
    return Cost(cycles, sorted(unknown))


def _key(kernel: Kernel) -> tuple[str, tuple[Shape, ...]]:
    return kernel.name, tuple(map(_long, kernel.results))


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
