"""The lengths of the TPU compiler's schedules (LLO bundles) of hand-written kernels.

The compiler writes its schedules or not for all that it compiles in a process, and those of a whole
step take it much longer to write, and gigabytes. So kernels are compiled one by one in a process of
their own.
"""

import pathlib
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
from jax import export
from jax.extend import core
from jax.sharding import SingleDeviceSharding

from jaxdiff.planning import hlo
from jaxdiff.planning.compilers import configure_compiler
from jaxdiff.planning.kernels import Key
from jaxdiff.planning.topology import Topology, topology_devices

_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")
_NAME = re.compile(r"%([\w.\-]+) = ")


def schedule_kernels(
    calls: Mapping[Key, core.JaxprEqn], topology: Topology
) -> Future[dict[Key, int]]:
    """Compile kernels in another process: the bundles of one grid step of each, on `topology`.

    Kernels for which the compiler dumps no schedule are left out.
    """
    if not calls:
        done: Future[dict[Key, int]] = Future()
        done.set_result({})
        return done
    programs = {key: _export(call) for key, call in calls.items()}
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    try:
        return pool.submit(_compile_kernels, programs, topology)
    finally:
        pool.shutdown(wait=False)


def _export(call: core.JaxprEqn) -> bytes:
    def kernel(*operands: Any) -> Any:
        return call.primitive.bind(*operands, **call.params)

    avals: list[Any] = [operand.aval for operand in call.invars]
    operands = (jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
    return bytes(export.export(jax.jit(kernel), platforms=("tpu",))(*operands).serialize())


def _compile_kernels(programs: Mapping[Key, bytes], topology: Topology) -> dict[Key, int]:
    """The bundles of each kernel; for a process that has not compiled anything yet."""
    jax.config.update("jax_platforms", "cpu")
    bundles = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        configure_compiler(topology.chip, bundle_folder=name)
        sharding = SingleDeviceSharding(topology_devices(topology)[0])
        for key, program in programs.items():
            for path in folder.rglob("*.txt"):  # of another kernel's operation of that name
                path.unlink()
            kernel = export.deserialize(bytearray(program))
            compilable = jax.jit(kernel.call, in_shardings=sharding, out_shardings=sharding)
            compiled = (
                compilable.trace(*kernel.in_avals).lower(lowering_platforms=("tpu",)).compile()
            )
            (operation,) = hlo.read(compiled.as_text() or "").kernels
            count = read_bundles(folder).get(operation.operation)
            if count is not None:
                bundles[key] = count
    return bundles


def read_bundles(folder: pathlib.Path) -> dict[str, int]:
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
