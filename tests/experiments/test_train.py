"""The examples of docs/training.md train, from Python alone."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
import tiny
from captioned_images import write_folder

import jaxdiff
from jaxdiff.checkpoints.components import read_component
from jaxdiff.core.errors import InputError
from jaxdiff.experiments import train as experiments
from jaxdiff.experiments.loggers import read_lines
from jaxdiff.models.build import param_dict

pytestmark = pytest.mark.usefixtures("standard_promotion")
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "training.md"
ONE_CALL, OWN_LOOP, OWN_OBJECTIVE = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
TINY = {
    "resolution=512": "resolution=16, bucket_multiple=8, validation_size=2, cache_dir='cache'",
    "steps=1000": "steps=2, log_every=1, sample_every=0, tensorboard=False",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    tiny.write_tiny(folder / "model")
    write_folder(folder / "images", 24, sizes=((16, 16),))
    return folder


def run(code, names):
    for example, small in TINY.items():
        code = code.replace(example, small)
    exec(code, names)
    return names


@pytest.mark.slow
def test_the_examples_for_a_model_train_it(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    lines = []
    train = jaxdiff.train

    def watched(config, workdir):
        return train(config, workdir, callback=lambda *line: lines.append(line))

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "train", watched)
        names = run(ONE_CALL, {})
    result, config = names["result"], names["config"]
    assert result.export == pathlib.Path("runs/tuned/export")
    assert result.step == 2
    assert [step for step, _ in lines] == [1, 2]
    assert lines[-1][1] == result.metrics
    log = read_lines(folder / "runs/tuned/log.jsonl")
    assert [line.pop("step") for line in log] == [1, 2]
    assert log[-1] == result.metrics
    assert names["pipe"]("a star", steps=1, output="numpy").images.shape == (1, 16, 16, 3)
    assert "step 2/2" in capsys.readouterr().err

    # The same batches in a loop of one's own give the same weights.
    def my_batches():
        stream = experiments.experiment(config, "runs/own").batches
        return (next(stream) for _ in range(config.steps))

    own = run(OWN_LOOP, {"config": config, "my_batches": my_batches})
    assert float(own["metrics"]["loss"]) == result.metrics["loss"]
    exported = param_dict(read_component(result.export / "unet").module)
    for path, array in own["state"].ema.items():
        np.testing.assert_array_equal(exported[path], array)

    # A second call has nothing left to do.
    result = train(config, "runs/tuned", progress=False)
    assert (result.step, result.metrics) == (2, {})
    with pytest.raises(InputError, match="seed: got 1, expected 0 as trained so far"):
        train(dataclasses.replace(config, seed=1), "runs/tuned")


@pytest.mark.slow
def test_an_objective_of_ones_own_finds_the_wiener_filter():
    """E[x | x + n] = (x + n) / 2 for independent standard normal x and n."""
    state = run(OWN_OBJECTIVE, {})["state"]
    assert int(state.step) == 2000
    np.testing.assert_allclose(state.ema["kernel"], np.eye(2) / 2, atol=0.02)
    assert jax.tree.structure(state.params) == jax.tree.structure(state.ema)
