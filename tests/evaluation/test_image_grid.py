"""Pictures of pictures: everything in its place, unchanged."""

import numpy as np
import pytest

from jaxdiff.evaluation.image_grid import CELL, GAP, LABEL, LARGE, LINE, labelled_grid


def rows(images):
    return [list(row) for row in images]


@pytest.mark.parametrize("footers", [[], [["x", "y", "z"]], [["x", "y", "z"]] * 2])
def test_table_places_every_image_unchanged(footers):
    images = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    canvas = np.asarray(labelled_grid(rows(images), ["one", "two"], ["a", "b", "c"], footers))
    assert len(canvas) == LINE + 2 * (CELL + GAP) + len(footers) * 2 * LINE
    for row in range(2):
        for column in range(3):
            above = 2 * LINE * row if len(footers) == 2 else 0
            top, left = LINE + above + row * (CELL + GAP), LABEL + column * (CELL + GAP)
            cell = canvas[top : top + CELL : CELL // 4, left : left + CELL : CELL // 4]
            assert np.array_equal(cell, images[row, column])


def test_table_writes_its_texts():
    images = np.full((1, 1, 4, 4, 3), 255, np.uint8)
    bare, labelled = (
        np.asarray(labelled_grid(rows(images), [t], [t], [[t]])) for t in ("", "word")
    )
    changed = (bare != labelled).any(-1)
    assert changed[:LINE, LABEL:].any()
    assert changed[LINE : LINE + CELL, :LABEL].any()
    assert changed[LINE + CELL :, LABEL:].any()


def test_titles_and_second_lines_push_the_images_down():
    image = np.zeros((4, 4, 3), np.uint8)
    plain, more = (
        np.asarray(labelled_grid([[image]], [""], [head], title=title))
        for head, title in (("a", ""), ("a\nb", "title"))
    )
    assert np.array_equal(more[3 * LINE :, LABEL:], plain[LINE:, LABEL:])
    assert (more[:LINE] != 255).any()
    assert (more[LINE : 3 * LINE, LABEL:] != 255).any()


def test_blank_cells_and_images_that_are_large_or_no_squares():
    wide = np.zeros((100, 200, 3), np.uint8)
    canvas = np.asarray(labelled_grid([[None, wide]], [""], ["", ""]))
    assert np.mean(canvas[:, : LABEL + LARGE + GAP] == 255) > 0.99
    cell = canvas[LINE:, LABEL + LARGE + GAP :]
    assert (cell[: LARGE // 2, :LARGE] == 0).all()
    assert (cell[LARGE // 2 :] == 255).all()
