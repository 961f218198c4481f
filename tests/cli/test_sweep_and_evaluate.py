import numpy as np
import pytest

from jaxdiff.cli import main
from jaxdiff.cli.sweep import CELL, GAP, LABEL, LINE, table


def test_table_places_every_picture_unchanged():
    images = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    canvas = np.asarray(table(images, ["one", "two"], ["a", "b", "c"], []))
    for row in range(2):
        for column in range(3):
            top, left = LINE + row * (CELL + GAP), LABEL + column * (CELL + GAP)
            cell = canvas[top : top + CELL : CELL // 4, left : left + CELL : CELL // 4]
            assert np.array_equal(cell, images[row, column])


def test_table_writes_its_texts():
    images = np.full((1, 1, 4, 4, 3), 255, np.uint8)
    bare, labelled = (np.asarray(table(images, [t], [t], [t])) for t in ("", "word"))
    changed = (bare != labelled).any(-1)
    assert changed[:LINE, LABEL:].any()
    assert changed[LINE : LINE + CELL, :LABEL].any()
    assert changed[LINE + CELL :, LABEL:].any()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("sweep", ["--every", "0"], "sweep: every: got 0"),
        ("evaluate", ["--every", "0"], "evaluate: every: got 0"),
        ("sweep", ["--output", "."], "sweep: .: got a folder, expected a file"),
        ("evaluate", ["--output", "."], "evaluate: .: got a folder, expected a file"),
    ],
)
def test_bad_options(command, arguments, message, capsys):
    assert main.run(command, arguments) == 2
    assert capsys.readouterr().err.startswith(message)


def test_perfect_drawings_are_all_right(capsys, tmp_path):
    output = tmp_path / "report.json"
    code = main.run("evaluate", ["--model", "renders", "--every", "16", "--output", str(output)])
    assert code == 0
    assert "two all right" in capsys.readouterr().out
    assert output.exists()
