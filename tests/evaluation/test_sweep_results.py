"""The files of a sweep: whole, never another's, resumed."""

import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.evaluation.sweep_results import (
    TABLE_MARKER,
    Combination,
    Results,
    SweepPoint,
    write_table,
)


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', '{"options": {}, "cells": [{"scale": 1}]}'])
def test_files_that_are_no_results_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.json: got"):
        Results.open(path, {})
    assert path.read_text() == text


def test_a_table_never_replaces_a_page_of_another_kind(tmp_path):
    page, table = tmp_path / "guidance.md", tmp_path / "sweep.md"
    page.write_text("# Guidance")
    with pytest.warns(UserWarning, match="not written, because that file exists"):
        assert not write_table(page, TABLE_MARKER)
    assert page.read_text() == "# Guidance"
    for text in (f"{TABLE_MARKER}\n1", f"{TABLE_MARKER}\n2"):
        assert write_table(table, text)
        assert table.read_text() == text


def test_nothing_is_kept_while_the_model_refuses_everything(tmp_path):
    path = tmp_path / "a.json"
    results = Results.open(path, {"seed": 0})
    results.add(SweepPoint(Combination("autoguidance", "ddim", 4), 1.0), {"refused": "no"})
    assert not path.exists()
    results.add(SweepPoint(Combination("cfg", "ddim", 4), 1.0), {"seconds": 1.0})
    assert Results.open(path, {"seed": 0}).points == results.points
