"""Compile a traced program for a chip that is not present, and read memory and cost."""

import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jaxdiff.parallel.chips import GIB, TPU, Chip
from jaxdiff.planning import hlo, kernel_bundles, kernels
from jaxdiff.planning.compilers import compiler_version
from jaxdiff.planning.topology import Topology

# The TPU compiler's out-of-memory messages, before and after layout. Both include arguments and
# outputs, although the first calls all of it temporaries.
_NEEDED = re.compile(
    r"(?:memory required for HLO temporaries \(|in memory space hbm\. Used )([\d.]+)([KMGT])\b"
)
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


class CompiledProgram(NamedTuple):
    """The program of one chip: memory, cycles and communication.

    If it does not fit, only `total` is known; GPU compilers report no cycles.
    """

    total: float  # peak bytes
    fits: bool
    arguments: float = 0.0  # bytes of arguments
    temporaries: float = 0.0  # other bytes: activations, gradients, copies
    code: float = 0.0  # bytes of instructions
    flops: float | None = None  # counted by the compiler, without kernels
    cycles: float | None = None  # of the compiler's operations
    kernel_cycles: float = 0.0  # of hand-written kernels
    unknown_kernels: tuple[str, ...] = ()  # kernels without an estimate
    unknown_loops: int = 0  # loops of unknown length, counted once
    bytes_sent: Mapping[str, float] = MappingProxyType(
        {}
    )  # bytes that a chip sends, by kind of collective
    collective_counts: Mapping[str, int] = MappingProxyType({})  # number of collectives by kind
    compile_s: float = 0.0
    compiler: str = ""  # its name and version

    @property
    def is_compiled(self) -> bool:
        """Whether there is a program: the compiler may reject one that does not fit."""
        return self.arguments > 0


def parse_oom_message(message: str) -> float | None:
    """Bytes that a program needs according to the TPU compiler's out-of-memory `message`.

    None for another message.
    """
    found = _NEEDED.search(message)
    return float(found.group(1)) * UNITS[found.group(2)] if found else None


def compile_traced(
    traced: Any, topology: Topology, *, transformer: bool = False
) -> CompiledProgram:
    """Compile `traced` (of `jax.jit(...).trace`), or a `transformer`, for `topology`."""
    chip = topology.chip
    if isinstance(chip, TPU):
        return _compile_for_tpu(
            traced, topology, chip, chip.transformer_options if transformer else {}
        )
    started = time.perf_counter()
    lowered = traced.lower(lowering_platforms=(chip.platform,))
    # Without a GPU, libraries cannot be asked which of their kernels is the fastest.
    compiled = lowered.compile({"xla_gpu_autotune_level": 0})
    seconds = time.perf_counter() - started
    program = _program_stats(compiled, hlo.read(compiled.as_text()), chip)
    return program._replace(fits=program.total <= chip.hbm, compile_s=seconds)


def _compile_for_tpu(
    traced: Any, topology: Topology, chip: TPU, options: dict[str, str]
) -> CompiledProgram:
    calls = kernels.pallas_calls(traced.jaxpr.jaxpr)
    bundles = kernel_bundles.schedule_kernels(calls, topology)
    started = time.perf_counter()
    try:
        lowered = traced.lower(lowering_platforms=(chip.platform,))
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        size = parse_oom_message(str(error))
        if size is None:
            raise
        seconds = time.perf_counter() - started
        return CompiledProgram(size, fits=False, compile_s=seconds, compiler=compiler_version(chip))
    seconds = time.perf_counter() - started
    program = hlo.read(compiled.as_text())
    cost = kernels.kernel_cost(
        program.kernels,
        {key: kernels.kernel_grid(call) for key, call in calls.items()},
        bundles.result(),
        chip.cores,
        chip.bandwidth / chip.clock,
    )
    return _program_stats(compiled, program, chip)._replace(
        flops=(compiled.cost_analysis() or {}).get("flops"),
        cycles=program.cycles,
        kernel_cycles=cost.cycles,
        unknown_kernels=tuple(cost.unknown),
        compile_s=seconds,
    )


def _program_stats(compiled: Any, program: hlo.Program, chip: Chip) -> CompiledProgram:
    """The figures that all compilers report."""
    memory = compiled.memory_analysis()
    arguments_and_outputs = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
    counts: dict[str, int] = {}
    for collective in program.collectives:
        counts[collective.kind] = counts.get(collective.kind, 0) + collective.count
    return CompiledProgram(
        total=arguments_and_outputs
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        fits=True,
        arguments=memory.argument_size_in_bytes,
        temporaries=arguments_and_outputs
        - memory.argument_size_in_bytes
        + memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        unknown_loops=program.unknown_loops,
        bytes_sent=program.bytes_sent(),
        collective_counts=counts,
        compiler=compiler_version(chip),
    )
