"""Where the metrics of a training go: the terminal, a JSONL file, TensorBoard, Weights & Biases.

The JSONL log has one line per logged step, once however often training was resumed.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboardX.record_writer import RecordWriter

from jaxdiff.core.atomic import atomic_file, os_errors_as_write_error
from jaxdiff.core.errors import InputError
from jaxdiff.training.config import TrainConfig
from jaxdiff.training.config.aliases import new_log_keys

Values = Mapping[str, float]
LogDestination = Callable[[int, Values, pathlib.Path | None], None]


SUMMARY_FORMATS = {
    "loss": "loss {:.4f}",
    "step_ms": "{:.0f} ms/step",
    "images_per_s": "{:.0f} images/s",
    "grad_norm": "grad {:.2f}",
    "data_wait": "waiting {:.0%}",
    "mfu": "MFU {:.0%}",
}


def summary(values: Mapping[str, float]) -> str:
    """The most important values of a log line, on one line."""
    return "  ".join(
        text.format(values[name]) for name, text in SUMMARY_FORMATS.items() if name in values
    )


class Terminal:
    """Shows a training of `steps` steps that starts at step `start`. A context manager."""

    def __init__(self, *, start: int, steps: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[summary]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", completed=start, total=steps, summary="compiling")
        self._steps = steps

    def __enter__(self) -> "Terminal":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        self._bar.update(self._task, completed=step)

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Show a log line: in the bar, or as a line of its own."""
        text = summary(values)
        if self._console.is_terminal:
            if text:
                self._bar.update(self._task, summary=text)
        else:
            text = text or "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.message(f"step {step}/{self._steps}  {text}")

    def message(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


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

    def __enter__(self) -> "MetricLoggers":
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


class JsonlLog:
    """Appends to the log at `path` after removing the lines beyond step `step`.

    `step` is where training resumes: later lines were written by a run that died before its next
    checkpoint, and will be written again.
    """

    def __init__(self, path: pathlib.Path, *, step: int) -> None:
        self._path = path
        if path.exists():
            _truncate(path, step)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Append {"step": step, **values}."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _truncate(path: pathlib.Path, step: int) -> None:
    earlier = [line for line in read_lines(path) if line["step"] <= step]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf-8")


def read_lines(path: pathlib.Path) -> list[dict[str, float]]:
    """The complete lines of the log at `path`, with new keys, without a truncated last line."""
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [new_log_keys(json.loads(line)) for line in complete.splitlines()]
