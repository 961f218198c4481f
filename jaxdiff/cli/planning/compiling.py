"""A traced program compiled for a TPU that is not here, and what the compiler says of it."""

import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jaxdiff.cli.planning import hlo, kernels, schedules
from jaxdiff.cli.planning.chips import GIB
from jaxdiff.cli.planning.topology import Topology, compiler_version

# What the compiler says of a program that does not fit, before and after it has laid it out. Both
# count what the program is given and gives, although the first calls all of it temporaries.
_NEEDED = re.compile(
    r"(?:memory required for HLO temporaries \(|in memory space hbm\. Used )([\d.]+)([KMGT])\b"
)
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


class Compiled(NamedTuple):
    """One program of one chip: bytes, cycles and what it sends. Without cycles it does not fit."""

    total: float  # bytes at the busiest moment
    arguments: float = 0.0  # bytes of what it is given
    temporaries: float = 0.0  # bytes beside that: activations, gradients, copies
    code: float = 0.0  # bytes of instructions
    flops: float = 0.0  # as the compiler counts them, kernels left out
    cycles: float | None = None  # of the compiler's operations
    kernel_cycles: float = 0.0  # of kernels that were written by hand
    unknown: tuple[str, ...] = ()  # kernels of which nothing is known
    loops: int = 0  # whose length is not known, counted once
    sent: Mapping[str, float] = MappingProxyType(
        {}
    )  # bytes that a chip sends, by kind of collective
    times: Mapping[str, int] = MappingProxyType({})  # how often it does
    compile_s: float = 0.0
    compiler: str = ""  # its version


def refused(message: str) -> float | None:
    """Bytes of a chip that a program would take of which the compiler says `message`.

    None for a message about something else.
    """
    found = _NEEDED.search(message)
    return float(found.group(1)) * UNITS[found.group(2)] if found else None


def compile_traced(traced: Any, topology: Topology) -> Compiled:
    """Compile `traced` (of `jax.jit(...).trace`) for chips of `topology`."""
    calls, chip = kernels.calls(traced.jaxpr.jaxpr), topology.chip
    bundles = schedules.begin(calls, topology)
    started = time.perf_counter()
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        size = refused(str(error))
        if size is None:
            raise
        seconds = time.perf_counter() - started
        return Compiled(size, compile_s=seconds, compiler=compiler_version())
    seconds = time.perf_counter() - started
    program = hlo.read(compiled.as_text())
    cost = kernels.cost(
        program.kernels,
        {key: kernels.grid(call) for key, call in calls.items()},
        bundles.result(),
        chip.cores,
        chip.bandwidth / chip.clock,
    )
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    times: dict[str, int] = {}
    for collective in program.collectives:
        times[collective.kind] = times.get(collective.kind, 0) + collective.times
    return Compiled(
        total=kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        temporaries=kept - memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
        cycles=program.cycles,
        kernel_cycles=cost.cycles,
        unknown=tuple(cost.unknown),
        loops=program.unknown_loops,
        sent=program.sent(),
        times=times,
        compile_s=seconds,
        compiler=compiler_version(),
    )
