"""The measures of a sweep as curves over the guidance scale."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdiff.cli.sweep_results import Cell, Combination, Results

# Of each panel: the kind of result and the line of each name; the last two need judged pictures.
PANELS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("shares", {"one all right": "-", "two all right": "--"}),
    ("measures", {"diversity": "-"}),
    ("measures", {"chroma": "-", "clipped": "--"}),
    ("measures", {"contrast": "-"}),
)


def plot(
    results: Results,
    combinations: Sequence[Combination],
    scales: Sequence[float],
    path: pathlib.Path,
) -> None:
    """Write the curves as a PNG: a colour for each combination, shares with their errors."""
    import matplotlib  # only here: nothing else needs it

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    found = [results.cells[Cell(c, s)] for c in combinations for s in scales]
    panels = [
        (kind, styles)
        for kind, styles in PANELS
        if any(name in result.get(kind, {}) for name in styles for result in found)
    ]
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (kind, styles) in zip(axes, panels, strict=True):
        for name, style in styles.items():
            for number, combination in enumerate(combinations):
                points = _points(results, combination, scales, kind, name)
                if points:
                    look = {"marker": "o", "markersize": 4, "color": f"C{number}"}
                    axis.errorbar(*zip(*points, strict=True), linestyle=style, capsize=2, **look)
            axis.plot([], [], style, color="grey", label=name)
        axis.set(xlabel="guidance scale")
        axis.set_ylim(0, max(1.05 * axis.dataLim.y1, 0.01))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    if len(combinations) > 1:
        handles = [axes[0].plot([], [], color=f"C{n}")[0] for n in range(len(combinations))]
        names = [c.label(combinations).replace(" +", "+") for c in combinations]
        names = [name.replace("\n", ", ") for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png")


def _points(
    results: Results, combination: Combination, scales: Sequence[float], kind: str, name: str
) -> list[tuple[float, float, float]]:
    """Scale, value and standard error where there is one, from small scales to large ones."""
    found: list[tuple[float, Any]] = [
        (scale, results.cells[Cell(combination, scale)].get(kind, {}).get(name))
        for scale in sorted(scales)
    ]
    return [
        (s, value["value"], value["error"]) if isinstance(value, dict) else (s, value, 0.0)
        for s, value in found
        if value is not None
    ]
