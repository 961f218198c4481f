"""Checkpoints of a training: arrays and host state in one folder per step, all or nothing."""

import contextlib
import json
import pathlib
import shutil
import warnings
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from jaxdiff.checkpoints.orbax_arrays import write_small_arrays_whole
from jaxdiff.checkpoints.orbax_errors import root_cause, silence_repetitions, translate_orbax_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, PyTree
from jaxdiff.parallel.distributed import all_agree

UNREADABLE = "unreadable-"  # in front of the step: what a damaged checkpoint is renamed to


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: PyTree
    host: dict[str, Any]


def latest_step(folder: pathlib.Path) -> int | None:
    """The newest complete step in the folder of a `TrainingStore`, None without a checkpoint."""
    names = (path.name for path in (folder.iterdir() if folder.is_dir() else ()))
    return max((int(name) for name in names if name.isdigit()), default=None)


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Whether a `TrainingStore` in `folder` would find a checkpoint."""
    return latest_step(folder) is not None


class _DamagedError(Exception):
    """A checkpoint that cannot be read, and why."""


class TrainingStore:
    """The checkpoints in `folder`, one per saved step, of which the newest `keep` stay.

    Saving writes to a temporary name that is renamed when everything is on disk, so a process
    killed at any moment leaves complete checkpoints only. `read_only` leaves the folder as it is,
    and what another process is writing there. A context manager; leaving it waits for the disk.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 2, read_only: bool = False) -> None:
        silence_repetitions()
        write_small_arrays_whole()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            # Made by a thread, a folder that cannot be made leaves others waiting for ten minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._handlers: dict[str, Any] = {
            "state": ocp.StandardCheckpointHandler(),
            "host": ocp.JsonCheckpointHandler(),
        }
        self._folder, self.read_only = folder.resolve(), read_only
        self._newest: int | None = None  # step that was last given to `save`
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=self._handlers
        )

    def __enter__(self) -> "TrainingStore":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.wait()
        with contextlib.suppress(Exception):  # an error of the last save, raised or superseded
            self._manager.close()

    def save(self, step: int, state: PyTree, host: dict[str, Any]) -> None:
        """Write `state` (arrays) and `host` (JSON values) as `step`, unless it is there already.

        Returns when the arrays have been copied from the devices: their buffers may be given away
        then. A thread writes the copies; the next `save`, `check` or `wait` raises its WriteError;
        those that were complete before are still there.
        """
        if step in self._manager.all_steps():
            return
        host = host | {"digest": _digest(state, host)}
        self._newest = step
        with translate_orbax_errors(_name(step)):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
                ),
            )

    def check(self) -> bool:
        """Whether no save is under way; raises the WriteError of one that has ended badly."""
        if self._manager.is_saving_in_progress():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Return when all that was saved is on disk; WriteError if it could not be written."""
        with translate_orbax_errors(_name(self._newest)):
            self._manager.wait_until_finished()

    def restore(self, template: PyTree) -> Restored | None:
        """The newest checkpoint that can be read, None if there is none at all.

        `template` has the shapes, dtypes and shardings to restore to. A damaged checkpoint is
        passed over with a warning and renamed. Raises InputError when the stored arrays are of
        another structure, or when every checkpoint is damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged = []
        for step in steps:
            try:
                found = self._read(step, template)
            except _DamagedError as error:
                damaged.append((step, str(error)))
                continue
            self._quarantine(damaged, instead=step)
            return found
        if damaged:
            raise InputError(
                f"{self._folder}: got no checkpoint that can be read ({damaged[0][0]}: "
                f"{damaged[0][1]}), expected one (remove the folder to start again)"
            )
        return None

    def _read(self, step: int, template: PyTree) -> Restored:
        """A checkpoint. _DamagedError in every process if one of them finds it damaged."""
        found, error = None, None
        try:
            found = self._load(step, template)
        except InputError:
            raise
        except Exception as own:  # each layer of the reader has errors of its own
            error = own
        if not all_agree(found is not None) or found is None:
            raise _DamagedError(root_cause(error) if error else "another process cannot read it")
        expected = found.host.pop("digest", None)
        if not all_agree(_digest(found.state, found.host) == expected):
            raise _DamagedError("its content differs from what was saved")
        return found

    def _load(self, step: int, template: PyTree) -> Restored:
        """What this process reads by itself; the manager would wait for those that have failed."""
        stored = self._manager.item_metadata(step).state
        if stored is None:
            raise ValueError("its metadata is missing")
        _check_structure(stored, template, step)
        folder, read = epath.Path(self._folder) / str(step), self._handlers
        state = read["state"].restore(folder / "state", args=ocp.args.StandardRestore(template))
        host = read["host"].restore(folder / "host", args=ocp.args.JsonRestore())
        return Restored(step, state, dict(host))

    def _quarantine(self, damaged: list[tuple[int, str]], *, instead: int) -> None:
        """Warn of damaged checkpoints, and rename them so that their steps can be saved again."""
        for step, why in damaged:
            warnings.warn(
                f"checkpoint {step} cannot be read ({why}): resuming from {instead}", stacklevel=3
            )
            if not self.read_only and jax.process_index() == 0:
                target = self._folder / f"{UNREADABLE}{step}"
                shutil.rmtree(target, ignore_errors=True)
                (self._folder / str(step)).rename(target)
        if damaged and not self.read_only:
            all_agree(True)  # or others would find the old names
            self._manager.reload()


def _digest(state: PyTree, host: dict[str, Any]) -> list[int]:
    """Numbers that a flipped bit anywhere changes."""
    text = json.dumps(host, sort_keys=True)
    return [zlib.crc32(text.encode()), *_sums(jax.tree.leaves(state)).tolist()]


@jax.jit
def _sums(leaves: list[Array]) -> Array:
    """The sum of each array's bits, as unsigned words modulo 2^32.

    Sums of integers do not depend on their order, so they are the same for any sharding.
    """

    def words(leaf: Array) -> Array:
        width = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)

    return jnp.stack([jnp.sum(words(leaf), dtype=jnp.uint32) for leaf in leaves])


def _name(step: int | None) -> str:
    return "checkpoint" if step is None else f"checkpoint {step}"


def _check_structure(stored: Any, template: PyTree, step: int) -> None:
    names = {path: leaf.shape for path, leaf in _table(stored).items()}
    wanted = {path: leaf.shape for path, leaf in _table(template).items()}
    wrong = sorted(p for p in names.keys() | wanted if names.get(p) != wanted.get(p))
    if wrong:
        raise InputError(
            f"checkpoint {step}, {wrong[0]}: got shape {names.get(wrong[0])}, "
            f"expected {wanted.get(wrong[0])}"
        )


def _table(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
