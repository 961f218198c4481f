"""EMA snapshots that a training saves, one folder per step."""

import pathlib
import shutil
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp

from jaxdiff.checkpoints.orbax_arrays import write_small_arrays_whole
from jaxdiff.checkpoints.orbax_errors import silence_repetitions, translate_orbax_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree


class EMASnapshots:
    """The snapshots in `folder`: at each saved step an average of the weights for each name.

    All processes of a training have to save and restore together.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        silence_repetitions()
        write_small_arrays_whole()
        self._folder = folder.resolve()

    def steps(self) -> list[int]:
        """The steps that are there, in order."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    def save(self, step: int, averages: Mapping[str, PyTree]) -> None:
        """Write those of `step`, whole or not at all, unless they are there."""
        if step not in self.steps():
            with translate_orbax_errors(f"averages {step}"), ocp.StandardCheckpointer() as writer:
                writer.save(self._folder / str(step), dict(averages))

    def drop_after(self, step: int) -> None:
        """Remove what lies beyond `step`, where a training goes on."""
        for later in self.steps():
            if later > step and jax.process_index() == 0:
                shutil.rmtree(self._folder / str(later))

    def restore(self, step: int, template: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Those of `step` as `template` (shapes, dtypes, shardings) says; InputError if not."""
        try:
            with ocp.StandardCheckpointer() as reader:
                return reader.restore(self._folder / str(step), dict(template))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise InputError(
                f"{self._folder / str(step)}: got EMA weights that do not fit this training, "
                f"expected those of the same config ({str(error).splitlines()[0][:120]})"
            ) from None
