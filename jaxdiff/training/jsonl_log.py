"""The JSONL log: one line per logged step, once however often training was resumed."""

import json
import pathlib
from collections.abc import Mapping

from jaxdiff.core.atomic import atomic_file
from jaxdiff.training.config.aliases import new_log_keys


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
    kept = [line for line in read_lines(path) if line["step"] <= step]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_lines(path: pathlib.Path) -> list[dict[str, float]]:
    """The complete lines of the log at `path`, with new keys, without a truncated last line."""
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [new_log_keys(json.loads(line)) for line in complete.splitlines()]
