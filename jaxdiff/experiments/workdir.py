"""The config.json and the lock of a workdir."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import filelock

from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.training_state import has_checkpoint
from jaxdiff.core.atomic import atomic_file, os_errors_as_write_error
from jaxdiff.core.configs import from_mapping_recursive
from jaxdiff.core.errors import InputError
from jaxdiff.experiments.experiment import CHECKPOINTS
from jaxdiff.parallel.distributed import is_first
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.config.aliases import new_fields, new_path

Identity = Mapping[str, Any]


def check_identity(identity: Identity, workdir: pathlib.Path) -> None:
    """InputError if `workdir` has a checkpoint of a training with another resume identity."""
    path = workdir / "config.json"
    if not has_checkpoint(workdir / CHECKPOINTS) or not path.exists():
        return
    before = read_object(path).get("identity")
    if not isinstance(before, dict):
        raise InputError(f"{path}: got no identity, expected the config.json of a training")
    before = {new_path(name): value for name, value in before.items()}
    identity = json.loads(json.dumps(identity))
    changed = [
        f"{name}: got {identity[name]}, expected {before[name]}"
        for name in sorted(before.keys() & identity.keys())
        if before[name] != identity[name]
    ]
    if changed:
        raise InputError(
            f"{'; '.join(changed)} as trained so far "
            f"in {workdir} (take another --workdir for another model)"
        )


def write_config(config: TrainConfig, identity: Identity, workdir: pathlib.Path) -> None:
    """Write `workdir`/config.json."""
    path = workdir / "config.json"
    values = {"identity": identity} | dataclasses.asdict(config)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_config(workdir: pathlib.Path) -> TrainConfig:
    """The config that `write_config` wrote; InputError if there is none."""
    path = workdir / "config.json"
    values = read_object(path)
    values.pop("identity", None)
    values = new_fields(values, source=str(path))
    return from_mapping_recursive(TrainConfig, values, source=str(path))


@contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Create and lock `workdir`; InputError if another training has locked it."""
    lock = filelock.FileLock(workdir / ".lock", timeout=0)
    with os_errors_as_write_error(workdir, "a folder to write to"):
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            if is_first():  # one lock for all processes of a training
                lock.acquire()
        except filelock.Timeout:
            raise InputError(
                f"workdir: got {workdir}, where a training is running, expected another one"
            ) from None
    try:
        yield
    finally:
        lock.release()
