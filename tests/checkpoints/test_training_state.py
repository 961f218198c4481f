"""Training checkpoints: what was saved comes back, whatever happens to buffers, files and disks."""

import errno
import os
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxdiff.checkpoints.training_state import TrainingStore, latest_step
from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.parallel.mesh import data_mesh, replicate

HOST = {"data": {"position": 7}, "base": [1, 2]}


def state(seed: int) -> dict[str, jax.Array]:
    """Arrays of the dtypes that a state has, on all devices."""
    rng = np.random.default_rng(seed)
    return replicate(
        {
            "w": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
            "half": jnp.asarray(rng.normal(size=300), jnp.bfloat16),
            "step": jnp.int32(seed),
        },
        data_mesh(),
    )


def template():
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0)
    )


def equal(found, expected) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), found, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A folder with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with TrainingStore(folder) as store:
        for step in (1, 2):
            store.save(step, state(step), HOST)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> pathlib.Path:
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_the_newest_comes_back(saved):
    with TrainingStore(saved, read_only=True) as store:
        found = store.restore(template())
    assert (found.step, found.host) == (2, HOST)
    equal(found.state, jax.device_get(state(2)))


def test_buffers_may_be_given_away_once_save_returns(tmp_path):
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    current = replicate({"w": jnp.arange(2**18, dtype=jnp.float32)}, data_mesh())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), current
    )
    with TrainingStore(tmp_path / "c") as store:
        current = add(current)
        store.save(1, current, HOST)
        for _ in range(30):
            current = add(current)
        jax.block_until_ready(current)
        store.wait()
        found = store.restore(like)
    np.testing.assert_array_equal(found.state["w"], np.arange(2**18) + 1)


def test_only_the_newest_are_kept(tmp_path):
    with TrainingStore(tmp_path / "c", keep=2) as store:
        for step in range(1, 6):
            store.save(step, state(step), HOST)
        store.wait()
        assert latest_step(tmp_path / "c") == 5
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["4", "5"]


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("how", ["missing", "empty", "half", "flipped"])
def test_damage_to_any_file_is_noticed_or_does_no_harm(saved, tmp_path, how):
    noticed = []
    for i, name in enumerate(files(saved / "2")):
        folder = tmp_path / str(i)
        shutil.copytree(saved, folder)
        file, data = folder / "2" / name, bytearray((folder / "2" / name).read_bytes())
        if how == "missing":
            file.unlink()
        else:
            if how == "flipped":
                data[len(data) // 2] ^= 1
            file.write_bytes(data[: {"empty": 0, "half": len(data) // 2}.get(how)])
        with TrainingStore(folder) as store, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = store.restore(template())
        equal(found.state, jax.device_get(state(found.step)))
        assert found.host == HOST
        assert [str(w.message)[:27] for w in warned] == ["checkpoint 2 cannot be read"] * (
            2 - found.step
        )
        if found.step == 1:
            noticed.append(name)
            assert (folder / "unreadable-2").is_dir()
            with TrainingStore(folder) as store:  # its place is free again
                store.save(2, state(2), HOST)
                store.wait()
                equal(store.restore(template()).state, jax.device_get(state(2)))
    assert len(noticed) >= 4


def test_where_all_are_damaged_nothing_is_begun_anew(copied):
    for path in copied.rglob("manifest.ocdbt"):
        path.unlink()
    with (
        TrainingStore(copied) as store,
        pytest.raises(
            InputError, match=r"got no checkpoint that can be read .* \(remove the folder"
        ),
    ):
        store.restore(template())
    assert (copied / "2").is_dir()


def test_reading_only_renames_nothing(copied):
    (copied / "2" / "host" / "metadata").write_text("{")
    with (
        TrainingStore(copied, read_only=True) as store,
        pytest.warns(UserWarning, match="checkpoint 2 cannot be read"),
    ):
        assert store.restore(template()).step == 1
    assert sorted(path.name for path in copied.iterdir()) == ["1", "2"]


def test_another_structure_is_refused(saved):
    other = template() | {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with (
        TrainingStore(saved, read_only=True) as store,
        pytest.raises(InputError, match=r"checkpoint 2, w: got shape \(64, 32\), expected \(3,\)"),
    ):
        store.restore(other)


def test_a_full_disk_is_said_once_and_nothing_good_is_lost(copied, monkeypatch):
    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with TrainingStore(copied, keep=2) as store:
        monkeypatch.setattr(type(epath.Path()), "write_text", full)
        message = "got no space left on device, expected a disk that can be written"
        with pytest.raises(WriteError, match=message):  # noqa: PT012
            store.save(3, state(3), HOST)
            store.wait()
        assert latest_step(copied) == 2
    monkeypatch.undo()
    with TrainingStore(copied, keep=2) as store:
        equal(store.restore(template()).state, jax.device_get(state(2)))
    assert sorted(path.name for path in copied.iterdir() if path.name.isdigit()) == ["1", "2"]
