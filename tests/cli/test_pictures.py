import json

import pytest
from PIL import Image

from jaxdiff.cli.pictures import parameters_text, settings_of, write
from jaxdiff.core.errors import InputError

SETTINGS = {
    "prompt": "a naïve ring",
    "negative_prompt": "blur",
    "steps": 25,
    "sampler": "ddim",
    "guidance_scale": 5.0,
    "seed": 7,
    "width": 64,
    "height": 32,
    "model": "scenes",
}


def test_settings_survive_in_the_file(tmp_path):
    path = tmp_path / "a.png"
    write(path, Image.new("RGB", (64, 32), "red"), SETTINGS)
    assert settings_of(path) == SETTINGS
    with Image.open(path) as image:
        assert image.info["parameters"] == parameters_text(SETTINGS)
        assert json.loads(image.info["jaxdiff"]) == SETTINGS
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_parameters_text_is_the_a1111_form():
    assert parameters_text(SETTINGS).splitlines() == [
        "a naïve ring",
        "Negative prompt: blur",
        "Steps: 25, Sampler: ddim, CFG scale: 5, Seed: 7, Size: 64x32, Model: scenes",
    ]


def test_no_picture_has_no_settings(tmp_path):
    assert settings_of(tmp_path / "a.png") is None


def test_a_foreign_file_is_not_ours(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("not a picture")
    with pytest.raises(InputError, match="expected a free name"):
        settings_of(path)
