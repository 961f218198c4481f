"""The cores of a CPU as devices, which share a batch as other devices do."""

import contextlib
import os

import jax

MAX_FRACTION = 0.25  # of the machine's memory that the copies of the weights may take


def one_device_per_core(weight_bytes: int, most: int) -> int:
    """Make a CPU device of each core, at most `most`; returns how many.

    Fewer where so many copies of `weight_bytes` would take more than MAX_FRACTION of the memory.
    Nothing changes where JAX has its devices already, or XLA_FLAGS or JAX_NUM_CPU_DEVICES say how
    many there are; other kinds of devices are what they are.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = int(MAX_FRACTION * memory / max(weight_bytes, 1))
    own = getattr(os, "sched_getaffinity", None)
    cores = len(own(0)) if own else os.cpu_count() or 1
    count = max(1, min(cores, most, fitting))
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count == 1 or chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return 1
    with contextlib.suppress(RuntimeError):  # JAX has its devices
        jax.config.update("jax_num_cpu_devices", count)
        return count
    return 1
