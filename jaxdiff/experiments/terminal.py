"""Progress of a training: a live bar, or plain lines if the output is not a terminal."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

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
