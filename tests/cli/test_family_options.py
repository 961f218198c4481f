"""Options of `generate` that networks of some families alone read."""

import json

import numpy as np
import pytest
import tiny
import transformer_files as models
from PIL import Image

import jaxdiff
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.cli import main
from jaxdiff.generation.from_image import LEFT_OUT
from jaxdiff.generation.png_files import read_settings
from jaxdiff.pipeline.request import Request

SIZE = {"height": 16, "width": 16, "steps": 1}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """The folder of a FLUX.1 dev, and a function that generates with its pipeline."""
    place = tmp_path_factory.mktemp("flux")
    write_pipeline(place / "model", models.components("flux", place))
    pipe = tiny.first_devices(jaxdiff.load(place / "model"), 1)
    return place / "model", lambda **options: pipe("a ring", **SIZE, **options).images[0]


@pytest.fixture
def generate(flux, tmp_path):
    """A function that runs the command: the images by the scale and seed of their settings."""

    def run(*arguments, code=0):
        size = [text for name, value in SIZE.items() for text in (f"--{name}", str(value))]
        output = tmp_path / "out"
        command = [*arguments, "--model", str(flux[0]), *size, "--output", str(output)]
        assert main.run("generate", command) == code
        settings = {path: read_settings(path) for path in output.glob("*.png")}
        return {(s["distilled_guidance_scale"], s["seed"]): path for path, s in settings.items()}

    return run


def test_distilled_guidance_scale(flux, generate, tmp_path, capsys):
    """As in Python; lines of a file come before the command line; --from has it again."""
    _, wanted = flux
    cfg, given = ("--guidance", "cfg", "--guidance-scale", "2"), "--distilled-guidance-scale"
    prompts = tmp_path / "prompts.jsonl"
    lines = ({}, {"distilled_guidance_scale": 90.0}, {"distilled_guidance_scale": None, "seed": 1})
    prompts.write_text("\n".join(json.dumps({"prompt": "a ring"} | line) for line in lines))
    found = generate("--prompts", str(prompts), *cfg, given, "10")
    assert found.keys() == {(10.0, 0), (90.0, 0), (10.0, 1)}
    shown = {}
    for (scale, seed), path in found.items():
        own = {"distilled_guidance_scale": scale, "seed": seed}
        shown[scale, seed] = np.asarray(wanted(guidance="cfg", guidance_scale=2.0, **own))
        np.testing.assert_array_equal(np.asarray(Image.open(path)), shown[scale, seed])
    assert np.any(shown[10.0, 0] != shown[90.0, 0])
    path = found[90.0, 0]
    again = ["--from", str(path), "--model", str(flux[0]), "--output", str(tmp_path / "b")]
    assert main.run("generate", again) == 0
    (copy,) = (tmp_path / "b").glob("*.png")
    assert copy.read_bytes() == path.read_bytes()


def test_a_rule_that_settings_leave_out():
    """It is the default of a request, not that of the model."""
    for name, value in LEFT_OUT.items():
        assert Request.__dataclass_fields__[name].default == value


def test_a_scale_that_does_not_count(generate, capsys, monkeypatch):
    """Refused by its range before a model is read, and by the rule before anything is compiled."""
    generate("a ring", "--distilled-guidance-scale", "2", code=2)
    assert "distilled_guidance_scale: got 2.0 with guidance none" in capsys.readouterr().err
    monkeypatch.setattr(jaxdiff, "load", lambda *_, **__: pytest.fail("the model is read"))
    generate("a ring", "--distilled-guidance-scale", "101", code=2)
    assert "distilled_guidance_scale: got 101.0, expected" in capsys.readouterr().err
