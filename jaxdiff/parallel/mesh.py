"""The mesh: devices as data x fsdp x tensor, and what each of them holds of a batch.

The batch is split over "data" and "fsdp" together. A weight is whole along "data", and split over
"fsdp" and "tensor" as the tables of `sharding` say. A mesh for sampling may have a fourth axis:
"guidance" holds whole weights too, and shares the guidance streams of each image.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.core.configs import typed
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree
from jaxdiff.core.validate import one_of, positive

AXES = DATA, FSDP, TENSOR = ("data", "fsdp", "tensor")
GUIDANCE = "guidance"
SAMPLING_AXES = (DATA, FSDP, GUIDANCE, TENSOR)
MeshSpec = Mesh | Mapping[str, int] | str  # one, sizes by axis, or "fsdp=4,tensor=2"
INFER = -1  # the size of the axis that takes what the others leave


def make_mesh(
    data: int = INFER, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of these sizes over `devices` (all devices of all processes by default).

    One size may be INFER. The devices keep JAX's order, "tensor" changing fastest: neighbours on a
    TPU's torus, and the GPUs of one node, are in one group. Raises InputError.
    """
    chosen = list(jax.devices() if devices is None else devices)
    return _mesh({DATA: data, FSDP: fsdp, TENSOR: tensor}, chosen)


def sampling_mesh(mesh: MeshSpec, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh that shares a model's weights and the work on its images.

    Sizes are of SAMPLING_AXES, one of them may be INFER. "data" takes what the others leave of
    `devices`; others that are left out are 1. A mesh brings its own devices, all of which this
    process must have. Raises InputError.
    """
    sizes = dict(mesh.shape) if isinstance(mesh, Mesh) else _sizes_of(mesh)
    for name, size in sizes.items():
        one_of("mesh", name, SAMPLING_AXES)
        if size != INFER:
            positive(f"mesh.{name}", size)
    if isinstance(mesh, Mesh):
        order = [mesh.axis_names.index(axis) for axis in SAMPLING_AXES if axis in sizes]
        devices = list(np.transpose(mesh.devices, order).flat)
        if not set(devices) <= set(jax.local_devices()):
            raise InputError("mesh: got devices of other processes, expected those of this one")
    others = {axis: sizes.get(axis, 1) for axis in SAMPLING_AXES[1:]}
    if others[GUIDANCE] == 1:
        del others[GUIDANCE]
    data_size = 1 if INFER in others.values() else INFER
    return _mesh({DATA: sizes.get(DATA, data_size)} | others, devices)


def _sizes_of(mesh: Any) -> dict[str, int]:
    """The sizes that a mapping or a text has."""
    if isinstance(mesh, Mapping):
        return {name: typed(f"mesh.{name}", size, int) for name, size in mesh.items()}
    if not isinstance(mesh, str):
        raise InputError(f"mesh: got {mesh!r:.60}, expected sizes, such as fsdp=4,tensor=2")
    pairs = [part.partition("=") for part in mesh.split(",")]
    if not all(re.fullmatch(r"-1|\d+", size) for _, _, size in pairs):
        raise InputError(f"mesh: got {mesh!r}, expected axes and sizes, such as fsdp=4,tensor=2")
    sizes = {name.strip(): int(size) for name, _, size in pairs}
    if len(sizes) < len(pairs):
        raise InputError(f"mesh: got {mesh!r}, expected each axis once")
    return sizes


def _mesh(wanted: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    sizes = axis_sizes(wanted, len(devices))
    return Mesh(
        np.asarray(devices).reshape(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
    )


def axis_sizes(wanted: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes of the axes, INFER filled in; InputError unless they take all `devices`."""
    given = {name: size for name, size in wanted.items() if size != INFER}
    got = ", ".join(f"{name} {size}" for name, size in wanted.items() if size not in (1, INFER))
    if len(wanted) - len(given) > 1 or any(size < 1 for size in given.values()):
        raise InputError(f"mesh: got {got}, expected sizes of at least 1, and at most one {INFER}")
    product = math.prod(given.values())
    if devices % product or (len(given) == len(wanted) and product != devices):
        fitting = "is" if len(given) == len(wanted) else "divides"
        raise InputError(
            f"mesh: got {got}, expected sizes whose product {fitting} {devices}, the number of "
            "devices"
        )
    return {name: given.get(name, devices // product) for name in wanted}


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
