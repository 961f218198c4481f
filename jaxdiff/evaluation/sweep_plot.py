"""Plots of the results of a sweep over the guidance scale."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdiff.evaluation.sweep_results import Combination, Results, SweepPoint

# Of each panel: the kind of result, and the line style of each name.
PANELS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("accuracies", {"one object correct": "-", "two objects correct": "--"}),
    ("measures", {"diversity": "-"}),
    ("measures", {"chroma": "-", "clipped": "--"}),
    ("measures", {"contrast": "-"}),
)


MAX_OVERLAID = 5  # combinations in one row of panels


def plot(
    results: Results,
    combinations: Sequence[Combination],
    scales: Sequence[float],
    path: pathlib.Path,
) -> None:
    """Write the curves as a PNG: a colour for each combination, accuracies with their errors.

    If there are many combinations, each has a row of panels, which shows the first one in grey too.
    """
    import matplotlib  # only here: nothing else needs it

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    found = [results.points[SweepPoint(c, s)] for c in combinations for s in scales]
    panels = [
        (kind, styles)
        for kind, styles in PANELS
        if any(name in result.get(kind, {}) for name in styles for result in found)
    ]
    first, *others = combinations
    overlaid = len(combinations) <= MAX_OVERLAID
    rows = [list(combinations)] if overlaid else [[first, other] for other in others]
    colours = [f"C{n}" for n in range(MAX_OVERLAID)] if overlaid else ["0.7", "C0"]
    height = 4 if overlaid else 2.4
    figure = Figure(figsize=(4 * len(panels), height * len(rows)), layout="constrained", dpi=100)
    grid = figure.subplots(len(rows), len(panels), squeeze=False, sharex=True, sharey="col")
    for axes, row in zip(grid, rows, strict=True):
        for axis, (kind, styles) in zip(axes, panels, strict=True):
            for name, style in styles.items():
                for combination, colour in zip(row, colours, strict=False):
                    points = _points(results, combination, scales, kind, name)
                    if points:
                        look = {"marker": "o", "markersize": 4, "color": colour}
                        look |= {"linestyle": style, "capsize": 2}
                        axis.errorbar(*zip(*points, strict=True), **look)
            axis.grid(alpha=0.3)
        if not overlaid:
            axes[0].set_ylabel(_name(row[1], combinations).replace("+", "\n+"))
    for axes, (_, styles) in zip(grid.T, panels, strict=True):
        top = max(axis.dataLim.y1 for axis in axes)
        axes[0].set_ylim(0, max(1.05 * top, 0.01))
        axes[-1].set_xlabel("guidance scale")
        for name, style in styles.items():
            axes[0].plot([], [], style, color="grey", label=name)
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    shown = list(combinations) if overlaid else [first]
    if len(combinations) > 1:
        pairs = zip(shown, colours, strict=False)
        handles = [grid[0][0].plot([], [], color=colour)[0] for _, colour in pairs]
        names = [_name(c, combinations) for c in shown]
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png")


def _name(combination: Combination, among: Sequence[Combination]) -> str:
    return combination.label(among).replace(" +", "+").replace("\n", ", ")


def _points(
    results: Results, combination: Combination, scales: Sequence[float], kind: str, name: str
) -> list[tuple[float, float, float]]:
    """Scale, value and standard error (0 if it has none), sorted by scale."""
    found: list[tuple[float, Any]] = [
        (scale, results.points[SweepPoint(combination, scale)].get(kind, {}).get(name))
        for scale in sorted(scales)
    ]
    return [
        (s, value["value"], value["error"]) if isinstance(value, dict) else (s, value, 0.0)
        for s, value in found
        if value is not None
    ]
