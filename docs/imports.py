"""Draws how the folders of the package import each other.

    python docs/imports.py docs/imports.png

A row is a rank of `tests/test_layers.py`, an arrow the imports of one folder from another: the more
files import, the thicker. All arrows run down. Those to core/, which every folder imports, are left
out.
"""

import pathlib
import runpy
import sys
from collections import Counter

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LAYERS = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "tests" / "test_layers.py"))
FILES, PACKAGE, RANK = LAYERS["FILES"], LAYERS["PACKAGE"], LAYERS["RANK"]
COLOURS = plt.get_cmap("tab20")


def main(output: pathlib.Path) -> None:
    used = {path.relative_to(PACKAGE).parts[0] for path in FILES}
    arrows: Counter[tuple[str, str]] = Counter()
    for path in FILES:
        here = path.relative_to(PACKAGE).parts[0]
        arrows.update((here, there) for there in LAYERS["imported_folders"](path) - {here, "core"})
    rows: dict[int, list[str]] = {}
    for folder, rank in RANK.items():
        if folder in used:
            rows.setdefault(rank, []).append(folder)
    places = {
        folder: (3.0 * (i - (len(row) - 1) / 2) + 0.7 * (-1) ** rank, 1.5 * rank)
        for rank, row in rows.items()
        for i, folder in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(11, 12))
    for (here, there), count in sorted(arrows.items()):
        axes.annotate(
            "",
            xy=places[there],
            xytext=places[here],
            arrowprops={
                "arrowstyle": "-|>",
                "shrinkA": 14,
                "shrinkB": 16,
                "linewidth": 0.4 + 0.25 * count**0.5,
                "color": COLOURS(list(RANK).index(here) % 20),
                "alpha": 0.75,
                "connectionstyle": "arc3,rad=0.07",
            },
        )
    for folder, place in places.items():
        files = sum(path.relative_to(PACKAGE).parts[0] == folder for path in FILES)
        axes.text(
            *place,
            f"{folder}/\n{files} files",
            ha="center",
            va="center",
            bbox={"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "0.4"},
        )
    axes.set_xlim(-7, 7)
    axes.set_ylim(-1, 1.5 * max(RANK.values()) + 1)
    axes.axis("off")
    figure.savefig(output, dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
