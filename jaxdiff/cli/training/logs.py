"""Where the values of a training go: a JSONL file, TensorBoard, Weights & Biases."""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from jaxdiff.checkpoints.atomic import new_file
from jaxdiff.core.errors import InputError
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.log import JsonlLog

Values = Mapping[str, float]
Place = Callable[[int, Values, pathlib.Path | None], None]


class Logs:
    """All logs of the training in `workdir` that goes on after step `step`. A context manager.

    Called with a step, its values and perhaps the file of a picture.
    """

    def __init__(self, config: TrainConfig, workdir: pathlib.Path, *, step: int) -> None:
        lines = JsonlLog(workdir / "log.jsonl", step=step)
        self._open = ExitStack()
        self._places: list[Place] = [lambda step, values, picture: lines(step, values)]
        if config.tensorboard:
            self._places.append(self._tensorboard(workdir / "tensorboard", step))
        if config.wandb is not None:
            self._places.append(self._wandb(config, config.wandb, workdir))

    def __call__(self, step: int, values: Values, picture: pathlib.Path | None = None) -> None:
        """Write what is known of `step`."""
        for place in self._places:
            place(step, values, picture)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _tensorboard(self, folder: pathlib.Path, step: int) -> Place:
        """Event files; `purge_step` takes back what was written beyond the checkpoint."""
        writer = SummaryWriter(str(folder), purge_step=step + 1 if folder.exists() else None)
        self._open.callback(writer.close)

        def write(step: int, values: Values, picture: pathlib.Path | None) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            if picture is not None:
                with Image.open(picture) as opened:
                    writer.add_image("samples", np.asarray(opened), step, dataformats="HWC")
            writer.flush()

        return write

    def _wandb(self, config: TrainConfig, project: str, workdir: pathlib.Path) -> Place:
        """A run of `project` that a later start of the same workdir goes on with."""
        wandb = import_wandb()
        kept = workdir / "wandb_id"
        number = kept.read_text(encoding="utf-8") if kept.exists() else wandb.util.generate_id()
        with new_file(kept) as temporary:
            temporary.write_text(number, encoding="utf-8")
        run = wandb.init(
            project=project,
            id=number,
            resume="allow",
            name=workdir.name,
            dir=str(workdir),
            config=dataclasses.asdict(config),
        )
        self._open.callback(run.finish)

        def write(step: int, values: Values, picture: pathlib.Path | None) -> None:
            told: dict[str, Any] = dict(values)
            if picture is not None:
                told["samples"] = wandb.Image(str(picture))
            run.log(told, step=step)

        return write


def import_wandb() -> Any:
    """The package; InputError if it is not there."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise InputError("wandb: got no such package, expected it: pip install wandb") from None
