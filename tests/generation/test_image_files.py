import json
import re

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.grids import SPACINGS
from jaxdiff.generation.parameters_text import SAMPLER_WORDS, SCHEDULE_WORDS, parameters_text
from jaxdiff.generation.png_files import read_settings, write_png
from jaxdiff.samplers import SAMPLERS

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


# The fields of the last line as the web UI finds them.
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def test_parameters_text_is_the_a1111_form():
    assert parameters_text(SETTINGS).splitlines() == [
        "a naïve ring",
        "Negative prompt: blur",
        "Steps: 25, Sampler: DDIM, Schedule type: Automatic, CFG scale: 5, Seed: 7, Size: 64x32, "
        "Model: scenes",
    ]


def test_all_settings_are_in_the_parameters_text():
    """In A1111's words where it has some; others are fields that it passes over."""
    settings = SETTINGS | {
        "negative_prompt": None,
        "weights": "0123456789ab",
        "sampler": "heun:s_churn=10,s_noise=1.003",
        "timestep_spacing": "karras",
        "strength": 0.5,
        "clip_skip": 1,
        "loras": {"style 0a1b2c3d4e5f": 0.8, "line 99": 1.0},
        "guidance": "apg:eta=0.2,norm_threshold=15",
        "image": "a.png 123",
        "textual_inversions": ["word 77"],
    }
    prompt, fields = parameters_text(settings).splitlines()
    assert prompt == "a naïve ring <lora:style:0.8> <lora:line:1>"
    found = {
        name: json.loads(value) if value.startswith('"') else value
        for name, value in FIELD.findall(fields)
    }
    assert found == {
        "Steps": "25",
        "Sampler": "Heun",
        "Schedule type": "Karras",
        "CFG scale": "5",
        "Seed": "7",
        "Size": "64x32",
        "Model": "scenes",
        "Denoising strength": "0.5",
        "Clip skip": "2",
        "Sigma churn": "10",
        "Sigma noise": "1.003",
        "Weights": "0123456789ab",
        "Loras": '{"style 0a1b2c3d4e5f": 0.8, "line 99": 1.0}',
        "Guidance": "apg:eta=0.2,norm_threshold=15",
        "Image": "a.png 123",
        "Textual inversions": '["word 77"]',
    }
    hires = parameters_text(SETTINGS | {"hires_scale": 1.5, "hires_strength": 0.7, "eta": 0.5})
    assert "Denoising strength: 0.7, Eta DDIM: 0.5, Hires upscale: 1.5, Hires upscaler: L" in hires
    refined = parameters_text(SETTINGS | {"refiner": "xl 12", "refiner_start": 0.8})
    assert refined.endswith("Refiner: xl 12, Refiner switch at: 0.8")


def test_samplers_and_spacings_have_words():
    own = {"ddpm", "dpmpp-2s", "tcd", "deis", "flow-sde"}  # for which the web UI has none
    assert SAMPLERS.keys() - SAMPLER_WORDS.keys() == own
    assert SAMPLER_WORDS.keys() <= SAMPLERS.keys()
    assert SCHEDULE_WORDS.keys() - {None} == set(SPACINGS)


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
