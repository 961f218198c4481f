"""What a sweep found: kept in a file as it comes, and told as a table and short texts."""

import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.checkpoints.atomic import new_file
from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.core.errors import InputError

MARK = "<!-- jaxdiff sweep -->"  # the first line of our tables
KINDS = {"one thing": "one all right", "two things": "two all right"}  # under the columns


class Combination(NamedTuple):
    """What the cells of a row have in common beside the prompt."""

    guidance: str
    sampler: str
    steps: int

    def label(self, among: Sequence["Combination"]) -> str:
        """What tells it from others, a line each."""
        texts = (self.guidance.replace("+", " +"), self.sampler, f"{self.steps} steps")
        several = [len(set(column)) > 1 for column in zip(*among, strict=True)]
        return "\n".join(text for text, told in zip(texts, several, strict=True) if told)


class Cell(NamedTuple):
    """A combination at a scale."""

    combination: Combination
    scale: float


class Timed:
    """A model whose calls are timed, without compiling; it stands in for the model itself."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._seconds, self._pictures = 0.0, 0

    @property
    def defaults(self) -> Any:
        """Those of the model."""
        return self._pipe.defaults

    @property
    def seconds_per_picture(self) -> float:
        """The mean over all pictures that were computed, those that fill up batches included."""
        return self._seconds / max(1, self._pictures)

    def __call__(self, texts: Sequence[str], *, batch_size: int, **options: Any) -> Any:
        """Draw as the model does."""
        output = self._pipe(texts, batch_size=batch_size, **options)
        self._seconds += output.timings["total_s"] - output.timings["compile_s"]
        self._pictures += -(-len(texts) // batch_size) * batch_size
        return output


class Results:
    """The results of a sweep with some options, in a JSON file that is always whole."""

    def __init__(
        self, path: pathlib.Path, options: dict[str, Any], cells: dict[Cell, dict[str, Any]]
    ) -> None:
        self.path = path
        self.options = options
        self.cells = cells

    @classmethod
    def open(cls, path: pathlib.Path, options: Mapping[str, Any]) -> "Results":
        """What the file at `path` has, or nothing yet; InputError if it is of other options."""
        wanted = json.loads(json.dumps(options))
        if not path.exists():
            return cls(path, wanted, {})
        stored = read_object(path)
        there, rows = stored.get("options"), stored.get("cells")
        if not isinstance(there, dict) or not isinstance(rows, list):
            raise InputError(f"{path}: got no results of a sweep, expected another --output")
        for name in wanted | there:
            if there.get(name) != wanted.get(name):
                raise InputError(
                    f"{path}: got results with {name} {there.get(name)!r:.80} instead of "
                    f"{wanted.get(name)!r:.80}, expected the same options or another --output"
                )
        return cls(path, wanted, dict(_cell(path, row) for row in rows))

    def add(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Keep the result of a cell; nothing is written while all of them are refused."""
        self.cells[cell] = dict(result)
        if all("refused" in found for found in self.cells.values()):
            return
        rows = [
            {**cell.combination._asdict(), "scale": cell.scale, **found}
            for cell, found in self.cells.items()
        ]
        with new_file(self.path) as temporary:
            write_object(temporary, {"options": self.options, "cells": rows})


def _cell(path: pathlib.Path, row: Any) -> tuple[Cell, dict[str, Any]]:
    """A cell and its result from the file's row."""
    try:
        rest = dict(row)
        combination = Combination(*(rest.pop(name) for name in Combination._fields))
        return Cell(combination, float(rest.pop("scale"))), rest
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: got {row!r:.80}, expected a cell of a sweep") from None


def feet(results: Results, combination: Combination, scales: Sequence[float]) -> list[str]:
    """Under each scale, how many pictures come out all right."""
    texts = []
    for scale in scales:
        shares = results.cells[Cell(combination, scale)].get("shares", {})
        lines = [f"{k} {shares[name]['value']:.0%}" for k, name in KINDS.items() if name in shares]
        texts.append("\n".join(lines))
    return texts


def table_of(
    results: Results, combinations: Sequence[Combination], scales: Sequence[float], command: str
) -> str:
    """Everything that was measured, in Markdown: a row for each combination and scale."""
    cells = [Cell(combination, scale) for combination in combinations for scale in scales]
    found = [results.cells[cell] for cell in cells]
    shares, measures = (
        list(dict.fromkeys(name for result in found for name in result.get(kind, {})))
        for kind in ("shares", "measures")
    )
    names = (*Combination._fields, "scale", *shares, *measures, "evaluations", "seconds")
    lines = [
        MARK,
        f"`{command}`",
        "",
        f"Model {results.options['model']} on {results.options['device']}. Shares have their "
        "standard error. Evaluations are those of the network per image, an upper bound for "
        "adaptive guidance; seconds are per image, without compiling.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
    ]
    for cell, result in zip(cells, found, strict=True):
        values = [*map(str, cell.combination), f"{cell.scale:g}"]
        values += [_share(result.get("shares", {}).get(name)) for name in shares]
        values += [_number(result.get("measures", {}).get(name)) for name in measures]
        values += [str(result.get("evaluations", "")), _number(result.get("seconds"))]
        lines.append(f"| {' | '.join(values)} |")
    left = [
        f"- {', '.join(map(str, cell.combination))} at scale {cell.scale:g}: {result['refused']}"
        for cell, result in zip(cells, found, strict=True)
        if "refused" in result
    ]
    lines += ["", "Left blank, because the model cannot draw it:", "", *left] if left else []
    return "\n".join(lines) + "\n"


def _share(share: Mapping[str, float] | None) -> str:
    return "" if share is None else f"{share['value']:.3f} ± {share['error']:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def write_table(path: pathlib.Path, text: str) -> None:
    """Write a table and print its name; a warning where the file is something else, which stays."""
    if path.exists() and not path.read_bytes().startswith(MARK.encode()):
        warnings.warn(f"{path}: there already and no table of a sweep, so it stays", stacklevel=2)
        return
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(path)
