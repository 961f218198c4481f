"""One of two processes that save, and restore what only the second finds damaged.

    python tests/restoring.py FOLDER HOST:PORT ID

prints the step that it goes on from.
"""

import os
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.training_state import TrainingStore
from jaxdiff.parallel.distributed import DistributedConfig, all_agree, initialize
from jaxdiff.parallel.mesh import batch_sharding, data_mesh


def main(folder: pathlib.Path, coordinator: str, number: int) -> None:
    """Save steps 1 and 2, halve what process 1 has written of the second, restore."""
    initialize(DistributedConfig(coordinator=coordinator, num_processes=2, process_id=number))
    where = batch_sharding(data_mesh())
    values = np.arange(4096, dtype=np.float32).reshape(2, 2048)
    with TrainingStore(folder) as store:
        for step in (1, 2):
            here = step * values[number : number + 1]
            state = {"w": jax.make_array_from_process_local_data(where, here)}
            store.save(step, state, {"data": step})
    if number == 1:
        for path in folder.glob("2/state/ocdbt.process_1/d/*"):
            os.truncate(path, path.stat().st_size // 2)
    all_agree(True)  # it has done so
    wanted = {"w": jax.ShapeDtypeStruct(values.shape, jnp.float32, sharding=where)}
    with TrainingStore(folder) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = store.restore(wanted)
        assert found is not None
        store.save(2, found.state, found.host)  # under a name that is free again, for both
    (shard,) = found.state["w"].addressable_shards
    np.testing.assert_array_equal(shard.data, found.step * values[number : number + 1])
    print(found.step)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
