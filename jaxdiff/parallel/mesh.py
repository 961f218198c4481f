"""The data-parallel mesh: weights replicated, batches split along its one axis "data"."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree

DATA = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh called "data" over `devices` (all devices of all processes by default)."""
    chosen = np.asarray(jax.devices() if devices is None else list(devices))
    return Mesh(chosen, (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device of `mesh` holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is split over the devices of `mesh`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicate(tree: PyTree, devices: Mesh | Sequence[jax.Device]) -> PyTree:
    """`tree` as arrays that each of `devices` holds whole."""
    mesh = devices if isinstance(devices, Mesh) else data_mesh(devices)
    return jax.device_put(tree, replicated(mesh))


def check_batch_size(batch_size: int, mesh: Mesh) -> int:
    """Return the global `batch_size` if the devices of `mesh` can share it equally."""
    if batch_size % mesh.size:
        raise InputError(
            f"batch_size: got {batch_size}, expected a multiple of the {mesh.size} devices"
        )
    return batch_size


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch as global arrays split over the devices of `mesh`.

    Raises InputError when a first axis does not divide by this process's devices.
    """
    sharding = batch_sharding(mesh)
    local = len(mesh.local_devices)
    for name, array in batch.items():
        if array.shape[0] % local:
            raise InputError(
                f"{name}: got a batch of {array.shape[0]}, expected a multiple of {local} devices"
            )
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
