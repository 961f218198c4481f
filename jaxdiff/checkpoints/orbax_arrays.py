"""How orbax writes arrays that several devices hold."""

import functools

import jax
import orbax.checkpoint as ocp

MIN_SLICE_BYTES = 1 << 20  # of an array that is shared among the devices which hold it


@functools.cache
def write_small_arrays_whole() -> None:
    """From now on one device alone writes an array whose share per device would be small.

    Otherwise each of those that hold it writes a slice, and orbax compiles a program for every
    shape and device, which takes longer than it takes to write an array of this size.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
