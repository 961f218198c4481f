"""The progress bar of `jaxdiff generate`, and its report at the end."""

import json
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console


class Progress:
    """A bar on stderr over the denoising steps of all batches, with the remaining time."""

    def __init__(self, *, images: int, batch_size: int, quiet: bool) -> None:
        console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[done]}/{task.fields[images]} images"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal or images == 0,
        )
        self._images, self._batch = images, batch_size
        self.done = 0  # images that are written
        self._task = self._bar.add_task("generating", total=images, done=0, images=images)

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

    def update(self, done: int, steps: int) -> None:
        """The batch has finished `done` of its `steps` denoising steps."""
        batch = min(self._batch, self._images - self.done)
        self._bar.update(self._task, completed=self.done + batch * done / steps)

    def add_images(self, images: int) -> None:
        """A batch of `images` images has been written."""
        self.done += images
        self._bar.update(self._task, completed=self.done, done=self.done)


def print_report(report: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the report: as one JSON object, or the files and the times as text."""
    if as_json:
        print(json.dumps(report))
        return
    for path in report["images"]:
        print(path)
    count = len(report["images"]) - report["skipped"]
    images = "1 image" if count == 1 else f"{count} images"
    skipped = ""
    if report["skipped"]:
        verb = "exists" if report["skipped"] == 1 else "exist"
        skipped = f" ({report['skipped']} already {verb})"
    if report["renamed"]:
        skipped += f" ({report['renamed']} beside images of other settings)"
    times = f"compilation {report['compile_s']:.1f} s, sampling {report['sample_s']:.1f} s"
    print(
        f"{images}{skipped} in {report['total_s']:.1f} s on {report['device']}: {times}",
        file=sys.stderr,
    )
