import json

import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny")


def test_export_converts_and_sets_the_defaults(model, tmp_path, capsys):
    output = tmp_path / "half"
    code = main.run("export", [str(model), str(output), "--steps", "7", "--sampler", "euler"])
    assert code == 0
    assert "MB" in capsys.readouterr().out
    stored = json.loads((output / "jaxdiff.json").read_text())
    assert stored == {"guidance_scale": 3.0, "steps": 7, "sampler": "euler"}
    exact, half = (jaxdiff.load(folder, dtype="float32") for folder in (model, output))
    want = np.asarray(exact.unet.conv_in.kernel[...])
    got = np.asarray(half.unet.conv_in.kernel[...])
    assert np.array_equal(got, want.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int4"], "export: dtype: got 'int4'"),
        (["--sampler", "eulr"], "export: sampler: got 'eulr'"),
        (["--steps", "0"], "export: steps: got 0"),
    ],
)
def test_bad_choices_write_nothing(model, tmp_path, capsys, arguments, message):
    assert main.run("export", [str(model), str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()
