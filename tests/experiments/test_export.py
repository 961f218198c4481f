import json

import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.cli import main
from jaxdiff.models.build import param_dict
from jaxdiff.models.classifier import LatentClassifier, LatentClassifierConfig


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


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a finished training of a classifier."""
    folder = tmp_path_factory.mktemp("runs") / "classifier"
    config = LatentClassifierConfig(
        sample_size=8,
        in_channels=4,
        block_out_channels=(4,),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    write_component(folder / "export/classifier", tiny.random_component(LatentClassifier, config))
    return folder


def test_a_classifier_goes_beside_a_pipeline_and_stays_there(model, workdir, tmp_path):
    output = tmp_path / "both"
    assert main.run("export", [str(model), str(output)]) == 0
    before = (output / "model_index.json").read_bytes()
    assert main.run("export", [str(workdir), str(output)]) == 0
    assert (output / "model_index.json").read_bytes() == before
    exact = param_dict(read_component(workdir / "export/classifier").module)
    # a pipeline takes its classifier along
    assert main.run("export", [str(output), str(tmp_path / "again")]) == 0
    for folder in (output, tmp_path / "again"):
        stored = param_dict(read_component(folder / "classifier").module)
        for name, values in exact.items():
            np.testing.assert_array_equal(stored[name], np.asarray(values).astype(np.float16))


def test_a_pipeline_with_a_classifier_beside_it_loads_and_saves(model, workdir, tmp_path):
    output = tmp_path / "both"
    main.run("export", [str(model), str(output), "--dtype", "float32"])
    main.run("export", [str(workdir), str(output)])
    plain, both = (jaxdiff.load(folder, dtype="float32") for folder in (model, output))
    both.save(tmp_path / "saved")
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert saved == {path.name for path in model.iterdir()}
    assert plain.parts.components.keys() == both.parts.components.keys()


def test_a_classifier_has_no_defaults(workdir, tmp_path, capsys):
    output = tmp_path / "out"
    assert main.run("export", [str(workdir), str(output), "--steps", "7"]) == 2
    assert capsys.readouterr().err.startswith("export: steps: got 7 for")
    assert not output.exists()


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
