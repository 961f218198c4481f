"""What `jaxdiff generate` shows: a progress bar and the report at the end."""

import json
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console


class Progress:
    """A bar over the denoising steps of all batches, with the time that remains; on stderr."""

    def __init__(self, *, images: int, quiet: bool) -> None:
        console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[drawn]}/{task.fields[images]} pictures"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal or images == 0,
        )
        self._drawn = 0
        self._task = self._bar.add_task("drawing", total=images, drawn=0, images=images)
        self._batch = 0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, images: int) -> None:
        """The next batch draws `images` pictures."""
        self._batch = images

    def steps(self, done: int, steps: int) -> None:
        """`done` of `steps` denoising steps of the batch are through."""
        share = self._batch * done / steps
        if done == steps:
            self._drawn += self._batch
            share = 0
        self._bar.update(self._task, completed=self._drawn + share, drawn=self._drawn)


def print_report(report: Mapping[str, Any], *, as_json: bool) -> None:
    """The report as one JSON object, or the files and the times as text."""
    if as_json:
        print(json.dumps(report))
        return
    for path in report["images"]:
        print(path)
    drawn = len(report["images"]) - report["skipped"]
    pictures = "1 picture" if drawn == 1 else f"{drawn} pictures"
    skipped = ""
    if report["skipped"]:
        were = "was" if report["skipped"] == 1 else "were"
        skipped = f", {report['skipped']} {were} there already"
    times = f"compiled {report['compile_s']:.1f} s, sampled {report['sample_s']:.1f} s"
    print(
        f"{pictures}{skipped} in {report['total_s']:.1f} s ({times}) on {report['device']}",
        file=sys.stderr,
    )
