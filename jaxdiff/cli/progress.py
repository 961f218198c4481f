"""What `jaxdiff generate` says on stderr while it works, and its report at the end."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console

from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError

LINE_S = 30  # seconds between lines of progress where stderr is no terminal


class Progress:
    """The phases of a job and its denoising steps, with the remaining time.

    A bar on a terminal; elsewhere a line for each phase, and one every LINE_S seconds.
    """

    def __init__(self, *, quiet: bool) -> None:
        console = Console(stderr=True)
        self._lines = not quiet and not console.is_terminal
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[count]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, count="")
        self._images: int | None = 0
        self._printed_at = -float("inf")  # when the last line was printed
        self.done = 0  # images that are written

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

    def phase(self, text: str) -> None:
        """Say what is being done now."""
        self._bar.update(self._task, description=text)
        self._print_line(text)

    def start(self, images: int | None, *, compile_s: float | None) -> None:
        """`images` are generated next; their programs usually take `compile_s` to compile.

        None: of a file whose length is not known.
        """
        self._images = images
        if images != 0:
            usual = "the first time takes longest"
            if compile_s is not None:
                usual = f"{max(compile_s, 1):.0f} s last time"
            self.phase(f"compiling ({usual})")
            self._bar.update(self._task, total=images, count=self._count)

    def update(self, sampled: float) -> None:
        """So much has been sampled, in images: half of the steps are half an image."""
        self._bar.update(self._task, completed=sampled, description="generating")

    def add_images(self, images: int) -> None:
        """`images` more have been written."""
        self.done += images
        self._bar.update(self._task, count=self._count, description="generating")
        if time.monotonic() - self._printed_at > LINE_S:
            self._print_line(self._count)

    @property
    def _count(self) -> str:
        of_all = "" if self._images is None else f"/{self._images}"
        return f"{self.done}{of_all} images"

    def _print_line(self, text: str) -> None:
        if self._lines:
            print(f"generate: {text}", file=sys.stderr, flush=True)
            self._printed_at = time.monotonic()


def usual_compile_time(program: str) -> float | None:
    """For how many seconds `program` compiled when it last did so here; None: it never did."""
    return _compile_times().get(program)


def note_compile_time(program: str, seconds: float) -> None:
    """Remember for how long `program` has compiled, unless that cannot be written."""
    path, times = _compile_times_file(), _compile_times() | {program: round(seconds, 1)}
    with contextlib.suppress(OSError, InputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(times, indent=1))


def _compile_times_file() -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "jaxdiff" / "compile_times.json"


def _compile_times() -> dict[str, float]:
    try:
        times = json.loads(_compile_times_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return times if isinstance(times, dict) else {}


def print_report(report: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the report: as one JSON object, or the files and the times as text."""
    if as_json:
        print(json.dumps(report))
        return
    for path in report["images"]:
        print(path)
    count = report["count"] - report["skipped"]
    images = "1 image" if count == 1 else f"{count} images"
    notes = []
    if report["skipped"]:
        notes.append(
            f"{report['skipped']} already {'exists' if report['skipped'] == 1 else 'exist'}"
        )
    if report["renamed"]:
        notes.append(f"{report['renamed']} beside images of other settings")
    noted = f" ({', '.join(notes)})" if notes else ""
    text = f"{images}{noted} in {report['total_s']:.1f} s"
    if report["device"] is not None:
        times = f"compilation {report['compile_s']:.1f} s, sampling {report['sample_s']:.1f} s"
        text = f"{text} on {report['device']}: {times}"
    print(text, file=sys.stderr)
