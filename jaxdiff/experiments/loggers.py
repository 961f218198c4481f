"""Where the values of a training go: a JSONL file, TensorBoard, Weights & Biases."""

import dataclasses
import importlib
import os
import pathlib
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboardX.record_writer import RecordWriter

from jaxdiff.core.atomic import atomic_file, os_errors_as_write_error
from jaxdiff.core.errors import InputError
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.jsonl_log import JsonlLog

Values = Mapping[str, float]
Place = Callable[[int, Values, pathlib.Path | None], None]


class Logs:
    """All logs of the training in `workdir` that goes on after step `step`. A context manager.

    Called with a step, its values and perhaps the file of a picture.
    """

    def __init__(self, config: TrainConfig, workdir: pathlib.Path, *, step: int) -> None:
        self._open, self._workdir = ExitStack(), workdir
        with os_errors_as_write_error(workdir, "a disk to write logs to"):
            lines = JsonlLog(workdir / "log.jsonl", step=step)
            self._places: list[Place] = [lambda step, values, picture: lines(step, values)]
            if config.tensorboard:
                self._places.append(self._tensorboard(workdir / "tensorboard", step))
            if config.wandb is not None:
                self._places.append(self._wandb(config, config.wandb, workdir))

    def __call__(self, step: int, values: Values, picture: pathlib.Path | None = None) -> None:
        """Write what is known of `step`."""
        with os_errors_as_write_error(self._workdir, "a disk to write logs to"):
            for place in self._places:
                place(step, values, picture)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _tensorboard(self, folder: pathlib.Path, step: int) -> Place:
        """An event file, of which each step is on the disk when it has been written.

        The package's SummaryWriter writes in a thread: where that fails, training hears nothing of
        it and waits for ever once the thread's queue is full.
        """
        resumed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        writer = RecordWriter(str(folder / name))

        def add(step: int, **what: Any) -> None:
            event = Event(step=step, wall_time=time.time(), **what)
            writer.write(event.SerializeToString())

        def write(step: int, values: Values, picture: pathlib.Path | None) -> None:
            found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            if picture is not None:
                found.append(Summary.Value(tag="samples", image=_png(picture)))
            add(step, summary=Summary(value=found))
            writer.flush()

        def close() -> None:
            with suppress(OSError):  # of a step that could not be written, which has been said
                writer.close()

        self._open.callback(close)
        add(0, file_version="brain.Event:2")
        if resumed:  # what was written beyond the checkpoint is taken back
            add(step + 1, session_log=SessionLog(status=SessionLog.START))
        return write

    def _wandb(self, config: TrainConfig, project: str, workdir: pathlib.Path) -> Place:
        """A run of `project` that a later start of the same workdir goes on with."""
        wandb = import_wandb()
        kept = workdir / "wandb_id"
        number = kept.read_text(encoding="utf-8") if kept.exists() else wandb.util.generate_id()
        with atomic_file(kept) as temporary:
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


def _png(path: pathlib.Path) -> Any:
    with Image.open(path) as opened:
        width, height = opened.size
    colours = 3  # red, green and blue
    return Summary.Image(
        height=height, width=width, colorspace=colours, encoded_image_string=path.read_bytes()
    )


def import_wandb() -> Any:
    """The package; InputError if it is not there."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise InputError("wandb: got no such package, expected it: pip install wandb") from None
