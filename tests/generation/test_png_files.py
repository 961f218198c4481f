import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jaxdiff.core.errors import InputError
from jaxdiff.generation.png_files import parameters_text, read_settings, write_png

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
    write_png(path, Image.new("RGB", (64, 32), "red"), SETTINGS)
    assert read_settings(path) == SETTINGS
    with Image.open(path) as image:
        assert image.info["parameters"] == parameters_text(SETTINGS)
        assert json.loads(image.info["jaxdiff"]) == SETTINGS
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_former_names_in_a_file_are_read(tmp_path):
    path = tmp_path / "a.png"
    former = {"guidance": "three", "timesteps": "karras", "embeddings": ["x 1"], "guide": "m 2"}
    write_png(path, Image.new("RGB", (64, 32), "red"), SETTINGS | former)
    assert read_settings(path) == SETTINGS | {
        "guidance": "negative",
        "timestep_spacing": "karras",
        "textual_inversions": ["x 1"],
        "guidance_model": "m 2",
    }


def test_parameters_text_is_the_a1111_form():
    assert parameters_text(SETTINGS).splitlines() == [
        "a naïve ring",
        "Negative prompt: blur",
        "Steps: 25, Sampler: ddim, CFG scale: 5, Seed: 7, Size: 64x32, Model: scenes",
    ]


def test_no_image_has_no_settings(tmp_path):
    assert read_settings(tmp_path / "a.png") is None


@pytest.mark.parametrize("block", [None, "[1]", "{", "text"])
def test_a_foreign_file_is_not_ours(tmp_path, block):
    path = tmp_path / "a.png"
    if block == "text":
        path.write_text("not a picture")
    else:  # a PNG as an editor saves it again, or with a block that is no object
        info = PngInfo()
        if block:
            info.add_itxt("jaxdiff", block)
        Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    assert read_settings(path) is None


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/a\.png: got .*, expected a file to write"):
        write_png(tmp_path / "file" / "a.png", Image.new("RGB", (4, 4)), SETTINGS)
