"""The mesh: devices as data x fsdp x tensor, and what each of them holds of a batch.

The batch is split over "data" and "fsdp" together. A weight is whole along "data", and split over
"fsdp" and "tensor" as the tables of `sharding` say.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree

AXES = DATA, FSDP, TENSOR = ("data", "fsdp", "tensor")
INFER = -1  # the size of the axis that takes what the others leave


def make_mesh(
    data: int = INFER, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of these sizes over `devices` (all devices of all processes by default).

    One size may be INFER. The devices keep JAX's order, "tensor" changing fastest: neighbours on a
    TPU's torus, and the GPUs of one node, are in one group. Raises InputError.
    """
    chosen = list(jax.devices() if devices is None else devices)
    return Mesh(
        np.asarray(chosen).reshape(axis_sizes((data, fsdp, tensor), len(chosen))),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


def axis_sizes(wanted: Sequence[int], devices: int) -> tuple[int, ...]:
    """The sizes of the axes, INFER filled in; InputError unless they take all `devices`."""
    got = ", ".join(f"{name} {size}" for name, size in zip(AXES, wanted, strict=True))
    if list(wanted).count(INFER) > 1 or any(size < 1 and size != INFER for size in wanted):
        raise InputError(f"mesh: got {got}, expected sizes of at least 1, and at most one {INFER}")
    rest = devices // math.prod(size for size in wanted if size != INFER)
    found = tuple(rest if size == INFER else size for size in wanted)
    if math.prod(found) != devices:
        raise InputError(f"mesh: got {got}, expected sizes whose product is {devices} devices")
    return found


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that splits the batch only, over `devices` (all of them by default)."""
    return make_mesh(devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device of `mesh` holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is split over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def num_batch_shards(mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def replicate(tree: PyTree, devices: Mesh | Sequence[jax.Device]) -> PyTree:
    """`tree` as arrays that each of `devices` holds whole."""
    mesh = devices if isinstance(devices, Mesh) else data_mesh(devices)
    return jax.device_put(tree, replicated(mesh))


def device_put_global(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that this process has whole, as one of which every device holds its part.

    All processes have to have the same.
    """
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def check_batch_size(batch_size: int, mesh: Mesh) -> int:
    """Return the global `batch_size` if the devices of `mesh` can share it equally."""
    shards = num_batch_shards(mesh)
    if batch_size % shards:
        raise InputError(
            f"batch_size: got {batch_size}, expected a multiple of the {shards} devices that "
            "share a batch"
        )
    return batch_size


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch as global arrays split over the devices of `mesh`.

    Raises InputError when a first axis does not divide by the parts that this process holds.
    """
    sharding = batch_sharding(mesh)
    local = max(1, num_batch_shards(mesh) // jax.process_count())
    for name, array in batch.items():
        if array.shape[0] % local:
            raise InputError(
                f"{name}: got a batch of {array.shape[0]}, expected a multiple of {local} devices"
            )
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
