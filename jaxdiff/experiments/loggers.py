"""Log metrics to a JSONL file, TensorBoard and Weights & Biases."""

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
LogDestination = Callable[[int, Values, pathlib.Path | None], None]


class MetricLoggers:
    """All logs of the training in `workdir` that resumes after step `step`. A context manager.

    Called with a step, its values and optionally the file of a sample grid.
    """

    def __init__(self, config: TrainConfig, workdir: pathlib.Path, *, step: int) -> None:
        self._open, self._workdir = ExitStack(), workdir
        with os_errors_as_write_error(workdir, "a disk to write logs to"):
            jsonl = JsonlLog(workdir / "log.jsonl", step=step)
            self._destinations: list[LogDestination] = [
                lambda step, values, image: jsonl(step, values)
            ]
            if config.tensorboard:
                self._destinations.append(self._tensorboard(workdir / "tensorboard", step))
            if config.wandb is not None:
                self._destinations.append(self._wandb(config, config.wandb, workdir))

    def __call__(self, step: int, values: Values, image: pathlib.Path | None = None) -> None:
        """Write the values of `step`."""
        with os_errors_as_write_error(self._workdir, "a disk to write logs to"):
            for destination in self._destinations:
                destination(step, values, image)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _tensorboard(self, folder: pathlib.Path, step: int) -> LogDestination:
        """An event file that is flushed after each step.

        The package's SummaryWriter writes in a thread: if that fails, no error is raised, and
        training waits for ever once the thread's queue is full.
        """
        resumed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        writer = RecordWriter(str(folder / name))

        def add(step: int, **what: Any) -> None:
            event = Event(step=step, wall_time=time.time(), **what)
            writer.write(event.SerializeToString())

        def write(step: int, values: Values, image: pathlib.Path | None) -> None:
            summaries = [
                Summary.Value(tag=name, simple_value=value) for name, value in values.items()
            ]
            if image is not None:
                summaries.append(Summary.Value(tag="samples", image=_png(image)))
            add(step, summary=Summary(value=summaries))
            writer.flush()

        def close() -> None:
            with suppress(OSError):  # the error of the last write was reported
                writer.close()

        self._open.callback(close)
        add(0, file_version="brain.Event:2")
        if resumed:  # discard events beyond the checkpoint
            add(step + 1, session_log=SessionLog(status=SessionLog.START))
        return write

    def _wandb(self, config: TrainConfig, project: str, workdir: pathlib.Path) -> LogDestination:
        """A run of `project`, which the workdir's next start resumes."""
        wandb = import_wandb()
        id_file = workdir / "wandb_id"
        run_id = (
            id_file.read_text(encoding="utf-8") if id_file.exists() else wandb.util.generate_id()
        )
        with atomic_file(id_file) as temporary:
            temporary.write_text(run_id, encoding="utf-8")
        run = wandb.init(
            project=project,
            id=run_id,
            resume="allow",
            name=workdir.name,
            dir=str(workdir),
            config=dataclasses.asdict(config),
        )
        self._open.callback(run.finish)

        def write(step: int, values: Values, image: pathlib.Path | None) -> None:
            logged: dict[str, Any] = dict(values)
            if image is not None:
                logged["samples"] = wandb.Image(str(image))
            run.log(logged, step=step)

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
