"""The results of a sweep: a JSON file, a table in Markdown and short summaries."""

import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.checkpoints.jsonfiles import read_object, write_object
from jaxdiff.core.aliases import ACCURACIES, rename_keys, rename_settings
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError

TABLE_MARKER = "<!-- jaxdiff sweep -->"  # the first line of a table that we wrote
TIMING_BATCH, TIMING_RUNS = 32, 3  # images per batch, and runs, for --measure-speed
SUMMARY = {"one object": "one object correct", "two objects": "two objects correct"}


class Combination(NamedTuple):
    """The settings of a row of the grid."""

    guidance: str
    sampler: str
    steps: int
    classifier: float = 0.0  # scale of classifier guidance
    clip: float = 0.0  # scale of CLIP guidance

    def label(self, among: Sequence["Combination"]) -> str:
        """The settings that differ among the combinations, one per line."""
        varying = varying_fields(among)
        texts = {
            "guidance": self.guidance.replace("+", " +"),
            "sampler": self.sampler,
            "steps": f"{self.steps} steps",
            "classifier": f"classifier {self.classifier:g}",
            "clip": f"clip {self.clip:g}",
        }
        return "\n".join(texts[name] for name in varying)


def varying_fields(combinations: Sequence[Combination]) -> list[str]:
    """The fields in which some combinations differ."""
    columns = zip(*combinations, strict=True)
    pairs = zip(Combination._fields, columns, strict=True)
    return [name for name, column in pairs if len(set(column)) > 1]


class SweepPoint(NamedTuple):
    """A combination at a guidance scale."""

    combination: Combination
    scale: float


class Results:
    """The results of a sweep with certain options, in a JSON file that is always complete."""

    def __init__(
        self, path: pathlib.Path, options: dict[str, Any], points: dict[SweepPoint, dict[str, Any]]
    ) -> None:
        self.path = path
        self.options = options
        self.points = points

    @classmethod
    def open(cls, path: pathlib.Path, options: Mapping[str, Any]) -> "Results":
        """The results in the file at `path`, if any; InputError if they have other options."""
        wanted = json.loads(json.dumps(options))
        if not path.exists():
            return cls(path, wanted, {})
        stored = read_object(path)
        options_there, rows = stored.get("options"), stored.get("cells")
        if not isinstance(options_there, dict) or not isinstance(rows, list):
            raise InputError(f"{path}: got a file that no sweep wrote, expected another --output")
        found = rename_settings(options_there, source=str(path))
        for name in wanted | found:
            if found.get(name) != wanted.get(name):
                raise InputError(
                    f"{path}: got results with {name} {found.get(name)!r:.80} instead of "
                    f"{wanted.get(name)!r:.80}, expected the same options or another --output"
                )
        return cls(path, wanted, dict(_parse_point(path, row) for row in rows))

    def add(self, point: SweepPoint, result: Mapping[str, Any]) -> None:
        """Store the result of a point; nothing is written while all of them are refused."""
        self.points[point] = dict(result)
        if all("refused" in found for found in self.points.values()):
            return
        rows = [
            {**point.combination._asdict(), "scale": point.scale, **found}
            for point, found in self.points.items()
        ]
        with atomic_file(self.path) as temporary:
            write_object(temporary, {"options": self.options, "cells": rows})


def _parse_point(path: pathlib.Path, row: Any) -> tuple[SweepPoint, dict[str, Any]]:
    """A point and its result from a row of the file, former names replaced."""
    try:
        fields = rename_settings(row, source=str(path))
        if "accuracies" in fields:
            fields["accuracies"] = rename_keys(fields["accuracies"], ACCURACIES, source=str(path))
        combination = Combination(**{name: fields.pop(name) for name in Combination._fields})
        return SweepPoint(combination, float(fields.pop("scale"))), fields
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: got {row!r:.80}, expected a result of a sweep") from None


def column_summary(
    results: Results, combination: Combination, scales: Sequence[float]
) -> list[str]:
    """For each scale, the fraction of images in which everything is correct."""
    texts = []
    for scale in scales:
        found = results.points[SweepPoint(combination, scale)].get("accuracies", {})
        lines = [f"{k} {found[name]['value']:.0%}" for k, name in SUMMARY.items() if name in found]
        texts.append("\n".join(lines))
    return texts


def markdown_table(
    results: Results, combinations: Sequence[Combination], scales: Sequence[float], command: str
) -> str:
    """All results in Markdown: a row for each combination and scale."""
    points = [SweepPoint(combination, scale) for combination in combinations for scale in scales]
    found = [results.points[point] for point in points]
    accuracies, measures = (
        list(dict.fromkeys(name for result in found for name in result.get(kind, {})))
        for kind in ("accuracies", "measures")
    )
    varying = varying_fields(combinations)
    settings = combinations[0]._asdict().items()
    same = ", ".join(f"{name} {value}" for name, value in settings if name not in varying)
    timed = ["seconds"] if any("seconds" in result for result in found) else []
    names = (*varying, "scale", *accuracies, *measures, "evaluations", *timed)
    model = f"Model {results.options['model']} on {results.options['device']}"
    lines = [
        TABLE_MARKER,
        f"`{command}`",
        "",
        f"{model}; {same} in all rows." if same else f"{model}.",
        "Accuracies have their standard error. Evaluations are those of the network per image, an "
        "upper bound for adaptive guidance.",
        *[
            f"Seconds are per image, the best of {TIMING_RUNS} batches of {TIMING_BATCH}."
            for _ in timed
        ],
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
    ]
    for point, result in zip(points, found, strict=True):
        values = [str(getattr(point.combination, name)) for name in varying] + [f"{point.scale:g}"]
        values += [_accuracy(result.get("accuracies", {}).get(name)) for name in accuracies]
        values += [_number(result.get("measures", {}).get(name)) for name in measures]
        values += [str(result.get("evaluations", ""))]
        values += [_number(result.get(name)) for name in timed]
        lines.append(f"| {' | '.join(values)} |")
    refused = [
        f"- {point.combination.label(combinations)} at scale {point.scale:g}: {result['refused']}"
        for point, result in zip(points, found, strict=True)
        if "refused" in result
    ]
    lines += ["", "Not supported by the model:", "", *refused] if refused else []
    return "\n".join(lines) + "\n"


def _accuracy(accuracy: Mapping[str, float] | None) -> str:
    return "" if accuracy is None else f"{accuracy['value']:.3f} ± {accuracy['error']:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def write_table(path: pathlib.Path, text: str) -> bool:
    """Write a table; warn, keep the file and return False if it is no table of a sweep."""
    if path.exists() and not path.read_bytes().startswith(TABLE_MARKER.encode()):
        warnings.warn(
            f"{path}: not written, because that file exists and is no table of a sweep",
            stacklevel=2,
        )
        return False
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True
