"""A small part of the inputs of `make fuzz`, with their seed fixed."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_odd_inputs_lead_to_a_result_or_to_one_sentence():
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    run = subprocess.run(
        [sys.executable, "-m", "fuzz", "--inputs", "260", "--seed", "20", "--workers", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "260 inputs, 0 failures" in run.stdout
