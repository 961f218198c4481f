"""Distributed start-up, shutdown and agreement between the processes of one program."""

import contextlib
import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree
from jaxdiff.parallel.mesh import batch_sharding, data_mesh, replicated

EXIT_GRACE_SECONDS = 3  # in which the other processes may report their own error
AGREEMENT_LAG_STEPS = 2  # calls between a collective and the use of its result


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The coordinator and the processes; by default a single process, or what the cluster says."""

    coordinator: str | None = None  # host:port of process 0
    num_processes: int | None = None
    process_id: int | None = None  # of this one, from 0
    distributed: bool = False  # ask the cluster's environment even if it shows no other process

    def __post_init__(self) -> None:
        given = (self.coordinator, self.num_processes, self.process_id)
        if any(value is None for value in given) and any(value is not None for value in given):
            raise InputError(
                f"coordinator, num_processes, process_id: got {given}, expected all three or none"
            )
        count, number = self.num_processes, self.process_id
        if count is not None and number is not None and not 0 <= number < count:
            raise InputError(f"process_id: got {number}, expected one from 0 to {count - 1}")


def initialize(config: DistributedConfig) -> None:
    """Connect to the other processes of `config`. Call it before any use of a device.

    Slurm steps and Open MPI with several tasks, and TPU slices of several hosts as GKE describes
    them, are found by themselves; `distributed` has JAX look for any cluster that it knows.
    """
    if config.coordinator is None and not (config.distributed or _is_multiprocess(os.environ)):
        return
    # Of the CPU back end, whose devices talk across processes by gloo only; others ignore it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=config.coordinator,
        num_processes=config.num_processes,
        process_id=config.process_id,
    )


@contextlib.contextmanager
def abort_peers_on_error(report: Callable[[BaseException], int]) -> Iterator[None]:
    """When the block fails in one of several processes, exit at once.

    They may wait for it in a collective for ever, as it would for them at its end, and whoever
    started them learns that it failed. `report` says what happened and returns the exit code; those
    of an end that all agree on, 0 and 130, end as usual.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = report(error)
        if code in (0, 130):
            raise
        if is_first():  # the others' connections end with it: what failed alike may be said first
            time.sleep(EXIT_GRACE_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_multiprocess(environment: os._Environ[str] | dict[str, str]) -> bool:
    """Whether the cluster's environment variables announce more than one process."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or any(int(environment.get(name) or 1) > 1 for name in counts)


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def gather_to_host(tree: PyTree) -> PyTree:
    """`tree` as whole arrays on this host. A collective: all processes have to call it."""

    def get(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(get, tree)


def all_agree(value: bool) -> bool:
    """Whether `value` is true in every process. A collective: all processes have to call it."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def consensus(ask: Callable[[], bool]) -> Callable[[], bool]:
    """Whether any process says yes: the same answer in all of them at the same call.

    The answer is that of AGREEMENT_LAG_STEPS calls ago, so that nobody waits for the devices. A
    single process gets its own answer at once.
    """
    if jax.process_count() == 1:
        return ask
    mesh, asked = data_mesh(), deque[jax.Array]()
    any_process = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def answer() -> bool:
        here = np.full(len(mesh.local_devices), ask(), np.int32)
        everyone = jax.make_array_from_process_local_data(batch_sharding(mesh), here)
        asked.append(any_process(everyone))
        return len(asked) > AGREEMENT_LAG_STEPS and bool(asked.popleft())

    return answer
