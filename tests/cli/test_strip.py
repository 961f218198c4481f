"""The strip command: the last prediction is the picture, the first latent is noise."""

import numpy as np
import pytest
import tiny
from PIL import Image

import jaxdiff
from jaxdiff.cli import main
from jaxdiff.evaluation.image_grid import CELL, GAP, LABEL, LINE
from jaxdiff.evaluation.strip import evenly_spaced

TOP = 3 * LINE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model on one device; its programs are shared by all tests."""
    pipe = jaxdiff.load(tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny"))
    return tiny.first_devices(pipe, 1)


def strip(pipe, output, *arguments):
    """Run the command in this process, on a model that is in memory; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxdiff, "load", lambda name: pipe)
        return main.run("strip", [*arguments, "--output", str(output)])


def pixels(canvas, row, column):
    top, left = TOP + row * (CELL + GAP), LABEL + column * (CELL + GAP)
    cell = canvas[top : top + CELL : CELL // 16, left : left + CELL : CELL // 16]
    return cell.astype(int)


def test_from_noise_to_the_image(model, tmp_path):
    output = tmp_path / "strip.png"
    options = ("--guidance", "cfg+rescale", "--guidance-scale", "4", "--seed", "7")
    assert strip(model, output, "a ring", "--show-steps", "0,2,5", "--steps", "6", *options) == 0
    canvas = np.asarray(Image.open(output))
    assert canvas.shape == (TOP + 2 * (CELL + GAP), LABEL + 3 * (CELL + GAP), 3)
    shared = {"guidance": "cfg+rescale", "guidance_scale": 4.0, "seed": 7, "steps": 6}
    out = model("a ring", output="numpy", intermediate_steps=[0], **shared)
    assert np.abs(pixels(canvas, 0, 2) - out.images[0]).max() <= 1
    (noise,) = model.decode_latents(out.intermediates.x[0])
    assert np.abs(pixels(canvas, 1, 0) - noise).max() <= 1


def test_steps_are_spread_when_none_are_named(model, tmp_path):
    assert evenly_spaced(25, 8) == [0, 3, 7, 10, 14, 17, 21, 24]
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert evenly_spaced(1, 8) == [0]
    output = tmp_path / "strip.png"
    assert strip(model, output, "a ring") == 0
    with Image.open(output) as canvas:
        assert canvas.width == LABEL + 4 * (CELL + GAP)  # the model's own number of steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--show-steps", "0,x"], "strip: show_steps: got '0,x', expected steps such as"),
        (["--show-steps", "4"], "strip: show_steps: got 4, expected a number from 0 to 3"),
        (["--guidance", "cgf"], "strip: guidance: got 'cgf'"),
    ],
)
def test_mistakes_are_one_sentence(model, tmp_path, capsys, arguments, message):
    assert strip(model, tmp_path / "strip.png", "a ring", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
