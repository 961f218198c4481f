"""Checkpoints of a training: arrays and host state in one folder per step, all or nothing."""

import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: PyTree
    host: dict[str, Any]


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Whether a `TrainingStore` in `folder` would find a checkpoint."""
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


class TrainingStore:
    """The checkpoints in `folder`, one per saved step, of which the newest `keep` stay.

    Saving writes to a temporary name that is renamed when everything is on disk, so a process
    killed at any moment leaves complete checkpoints only. `read_only` leaves the folder as it is,
    and what another process is writing there. A context manager.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 2, read_only: bool = False) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            # The state's buffers are donated to the next step, so it must be on disk before.
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "host": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            folder.resolve(), options=options, item_handlers=handlers
        )

    def __enter__(self) -> "TrainingStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step, None if there is no checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, host: dict[str, Any]) -> None:
        """Write `state` (arrays) and `host` (JSON values) as `step`, unless it is there already."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
            ),
        )

    def restore(self, template: PyTree) -> Restored | None:
        """The newest checkpoint, None if there is none.

        `template` has the shapes, dtypes and shardings to restore to. Raises InputError when the
        stored arrays are not of that structure.
        """
        step = self.latest()
        if step is None:
            return None
        stored = self._manager.item_metadata(step).state
        _check_structure(stored, template, step)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(template), host=ocp.args.JsonRestore()
            ),
        )
        return Restored(step, found["state"], found["host"])


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
