"""Cycles of hand-written kernels: the compiler's own schedule of one step times their steps.

A TPU issues one bundle of instructions a cycle. For a kernel, the compiler reports how many bundles
one step of its grid has at most (kernel_bundles.py), without stalls and without steps that end
early. The blocks of its arrays are fetched and written meanwhile, at the memory's speed, each time
the block changes. A kernel takes the longer of both.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxdiff.planning.hlo import Kernel, Shape

Key = tuple[str, tuple[Shape, ...]]  # a kernel's name and its results, without sides of length one


class Grid(NamedTuple):
    """The grid of a kernel call."""

    steps: int
    bytes_moved: float  # bytes between the chip's memory and the kernel


class KernelCost(NamedTuple):
    """Total cycles of kernels, and the names of those without an estimate."""

    cycles: float
    unknown: list[str]


def pallas_calls(program: core.Jaxpr) -> dict[Key, core.JaxprEqn]:
    """Every Pallas kernel in a traced program, by name and shapes of results."""
    found = {}
    for equation in _equations(program):
        if equation.primitive.name == "pallas_call":
            results = tuple(_drop_unit_axes(_shape(out)) for out in equation.outvars)
            found[str(equation.params["name"]), results] = equation
    return found


def kernel_grid(call: core.JaxprEqn) -> Grid:
    """Steps and memory traffic of this call."""
    mapping = call.params["grid_mapping"]
    steps = [np.asarray(axis, np.int32).ravel() for axis in np.indices(mapping.grid)]
    bytes_moved = 0.0
    for block in mapping.block_mappings:
        size = math.prod(getattr(side, "block_size", side or 1) for side in block.block_shape)
        place = jax.vmap(core.jaxpr_as_fun(block.index_map_jaxpr))
        places = np.stack([np.broadcast_to(axis, steps[0].shape) for axis in place(*steps)])
        fetched = 1 + np.count_nonzero((np.diff(places) != 0).any(0))
        bytes_moved += fetched * size * block.array_aval.dtype.itemsize
    return Grid(math.prod(mapping.grid), bytes_moved)


def kernel_cost(
    kernels: Sequence[Kernel],
    grids: Mapping[Key, Grid],
    bundles: Mapping[Key, int],
    cores: int,
    bytes_per_cycle: float,
) -> KernelCost:
    """What `kernels` take on a chip whose `cores` share the steps of each.

    `bundles` are those of one step of a kernel, `bytes_per_cycle` is the memory
    bandwidth.
    """
    cycles, unknown = 0.0, set()
    for kernel in kernels:
        key = _key(kernel)
        if key in grids and key in bundles:
            grid = grids[key]
            cycles += kernel.count * max(
                grid.steps * bundles[key] / cores, grid.bytes_moved / bytes_per_cycle
            )
        else:
            unknown.add(kernel.name)
    return KernelCost(cycles, sorted(unknown))


def _key(kernel: Kernel) -> Key:
    return kernel.name, tuple(map(_drop_unit_axes, kernel.results))


def _shape(atom: Any) -> Shape:
    return tuple(atom.aval.shape)


def _drop_unit_axes(shape: Sequence[int]) -> Shape:
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
