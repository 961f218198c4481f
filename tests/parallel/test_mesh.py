"""Arrays lie where the mesh says, and a batch that cannot be shared is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.parallel.mesh import (
    batch_sharding,
    check_batch_size,
    data_mesh,
    replicate,
    replicated,
    shard_batch,
)


def test_mesh_covers_all_devices_or_those_given():
    assert data_mesh().size == len(jax.devices()) == 8
    mesh = data_mesh(jax.devices()[:3])
    assert dict(mesh.shape) == {"data": 3, "fsdp": 1, "tensor": 1}
    assert mesh.size == 3


def test_replicated_arrays_are_whole_on_every_device():
    tree = replicate({"a": np.arange(6.0, dtype=np.float32)}, jax.devices()[2:5])
    assert {s.device for s in tree["a"].addressable_shards} == set(jax.devices()[2:5])
    assert all(s.data.shape == (6,) for s in tree["a"].addressable_shards)


def test_replicate_takes_a_mesh_and_keys():
    mesh = data_mesh()
    key = replicate(jax.random.key(3), mesh)
    assert key.sharding == replicated(mesh)


def test_batches_are_split_along_the_first_axis():
    mesh = data_mesh()
    batch = shard_batch({"image": np.arange(16.0).reshape(16, 1), "ids": np.arange(16)}, mesh)
    assert batch["image"].sharding == batch_sharding(mesh)
    assert [s.data.shape for s in batch["ids"].addressable_shards] == [(2,)] * 8
    np.testing.assert_array_equal(np.asarray(batch["ids"]), np.arange(16))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="image: got a batch of 9, expected a multiple of 8"):
        shard_batch({"image": jnp.zeros((9, 2))}, data_mesh())
    with pytest.raises(InputError, match="batch_size: got 12, expected a multiple of the 8"):
        check_batch_size(12, data_mesh())
    assert check_batch_size(24, data_mesh()) == 24
