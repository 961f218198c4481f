"""What a sweep found: kept in a file as it comes, and told as a table and short texts."""

import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError

MARK = "<!-- jaxdiff sweep -->"  # the first line of our tables
PICTURES, TIMES = 32, 3  # drawn at once for the picture; draws, where they are timed
KINDS = {"one thing": "one all right", "two things": "two all right"}  # under the columns


class Combination(NamedTuple):
    """What the cells of a row have in common beside the prompt."""

    guidance: str
    sampler: str
    steps: int
    classifier: float = 0.0  # how far the model's classifier steers
    clip: float = 0.0  # and its CLIP

    def label(self, among: Sequence["Combination"]) -> str:
        """What tells it from others, a line each."""
        told = told_apart(among)
        texts = {
            "guidance": self.guidance.replace("+", " +"),
            "sampler": self.sampler,
            "steps": f"{self.steps} steps",
            "classifier": f"classifier {self.classifier:g}",
            "clip": f"clip {self.clip:g}",
        }
        return "\n".join(texts[name] for name in told)


def told_apart(combinations: Sequence[Combination]) -> list[str]:
    """The fields in which some of them differ."""
    columns = zip(*combinations, strict=True)
    pairs = zip(Combination._fields, columns, strict=True)
    return [name for name, column in pairs if len(set(column)) > 1]


class Cell(NamedTuple):
    """A combination at a scale."""

    combination: Combination
    scale: float


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
        with atomic_file(self.path) as temporary:
            write_object(temporary, {"options": self.options, "cells": rows})


def _cell(path: pathlib.Path, row: Any) -> tuple[Cell, dict[str, Any]]:
    """A cell and its result from the file's row."""
    try:
        rest = dict(row)
        combination = Combination(**{name: rest.pop(name) for name in Combination._fields})
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
    told = told_apart(combinations)
    alike = combinations[0]._asdict().items()
    same = ", ".join(f"{name} {value}" for name, value in alike if name not in told)
    timed = ["seconds"] if any("seconds" in result for result in found) else []
    names = (*told, "scale", *shares, *measures, "evaluations", *timed)
    where = f"Model {results.options['model']} on {results.options['device']}"
    lines = [
        MARK,
        f"`{command}`",
        "",
        f"{where}; everywhere {same}." if same else f"{where}.",
        "Shares have their standard error. Evaluations are those of the network per image, an "
        "upper bound for adaptive guidance.",
        *[f"Seconds are per image, the best of {TIMES} draws of {PICTURES}." for _ in timed],
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
    ]
    for cell, result in zip(cells, found, strict=True):
        values = [str(getattr(cell.combination, name)) for name in told] + [f"{cell.scale:g}"]
        values += [_share(result.get("shares", {}).get(name)) for name in shares]
        values += [_number(result.get("measures", {}).get(name)) for name in measures]
        values += [str(result.get("evaluations", ""))]
        values += [_number(result.get(name)) for name in timed]
        lines.append(f"| {' | '.join(values)} |")
    left = [
        f"- {cell.combination.label(combinations)} at scale {cell.scale:g}: {result['refused']}"
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
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(path)
