"""Signals, errors and messages that end a training before its last step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from jaxdiff.core.errors import WriteError
from jaxdiff.core.shutdown import SHUTDOWN_REQUESTED
from jaxdiff.experiments.terminal import Terminal
from jaxdiff.experiments.trainer import Trainer
from jaxdiff.parallel.distributed import ConsensusFlag, is_first
from jaxdiff.training import loop


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the first SIGINT or SIGTERM; the second one has its default action."""
    received: list[int] = []
    SHUTDOWN_REQUESTED.clear()

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        SHUTDOWN_REQUESTED.set()
        signal.signal(number, previous[signal.Signals(number)])

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train_until_stopped(trainer: Trainer) -> None:
    """Train to the last step, or raise SystemExit with a message on how to resume.

    The exit code is 0 after SIGTERM: pre-emption is not a failure.
    """
    steps = trainer.config.steps
    console = Console(stderr=True, quiet=not is_first())
    display = Terminal(start=trainer.step, steps=steps, console=console)
    with stop_signals() as received, display as terminal:
        if trainer.resumed:
            terminal.message(f"train: resuming after step {trainer.step} of {steps}")
        try:
            try:
                trainer.train(terminal, ConsensusFlag(lambda: bool(received)))
            finally:
                trainer.store.wait()
        except loop.StoppedError as stopped:
            terminal.message(f"train: {stopped}; the same command resumes from there")
            interrupted = signal.SIGINT in received  # here; it may have been another process
            raise SystemExit(128 + signal.SIGINT if interrupted else 0) from None
        except loop.NonFiniteError as error:
            command = "a start with a lower --optimiser.learning-rate"
            terminal.message(f"train: {error}; training stopped. {_resume_hint(trainer, command)}")
            raise SystemExit(1) from None
        except WriteError as error:  # the disk is full or gone
            command = "the same command"
            terminal.message(f"train: {error}; training stopped. {_resume_hint(trainer, command)}")
            raise SystemExit(1) from None


def _resume_hint(trainer: Trainer, command: str) -> str:
    """From where training resumes."""
    step = trainer.store.latest()
    if step is None:
        return f"There is no checkpoint yet: {command} starts over"
    return f"The last good checkpoint is of step {step}: {command} resumes from there"
