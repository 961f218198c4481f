import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.grids import SPACINGS
from jaxdiff.generation.from_image import with_settings
from jaxdiff.generation.image_files import SUFFIXES, check_format, encode
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


def write(path, image, *options, settings=SETTINGS):
    path.write_bytes(encode(image, settings, *options))
    return path


IMAGE = Image.linear_gradient("L").resize((64, 32)).convert("RGB")


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("as_array", [True, False])
def test_every_format_carries_its_settings(tmp_path, image_format, as_array):
    settings = SETTINGS | {"prompt": "a naïve ring 指輪 \U0001f600"}
    image = np.asarray(IMAGE) if as_array else IMAGE
    path = write(tmp_path / f"a{SUFFIXES[image_format]}", image, image_format, settings=settings)
    assert read_settings(path) == settings
    with Image.open(path) as stored:
        assert stored.format == image_format.upper()
        difference = np.abs(np.asarray(stored, float) - np.asarray(IMAGE, float))
        assert difference.max() <= (0 if image_format == "png" else 8)
        if image_format != "png":  # where A1111 reads its text
            comment = stored.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
            assert comment == b"UNICODE\0" + parameters_text(settings).encode("utf-16-be")


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_quality_decides_on_the_size(tmp_path, image_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    sizes = [len(encode(noise, SETTINGS, image_format, quality)) for quality in (10, 50, 95)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_are_a_tensor_with_metadata(tmp_path, dtype):
    latents = np.arange(24, dtype=dtype).reshape(4, 3, 2).transpose(1, 0, 2)
    path = write(tmp_path / "a.safetensors", latents, "latents")
    assert read_settings(path) == SETTINGS
    stored = load_file(path)["latents"]
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, latents)


@pytest.mark.parametrize("image_format", SUFFIXES)
@pytest.mark.parametrize("cut", [1, 20, 0.5])
def test_a_cut_file_has_no_settings(tmp_path, image_format, cut):
    image = np.ones((32, 32, 4), np.float32) if image_format == "latents" else IMAGE
    path = write(tmp_path / "a", image, image_format)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut) if cut < 1 else -cut])
    assert read_settings(path) is None


def test_other_files_have_no_settings(tmp_path):
    save_file({"x": np.ones(3)}, tmp_path / "a.safetensors", {"jaxdiff": "{}"})
    IMAGE.save(tmp_path / "a.jpg")
    IMAGE.save(tmp_path / "b.jpg", exif=bytes(20))
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "jaxdiff:[1"
    IMAGE.save(tmp_path / "a.webp", exif=exif)
    (tmp_path / "a.bin").write_bytes((2).to_bytes(8, "little") + b"[]")
    (tmp_path / "b.bin").write_bytes((2).to_bytes(8, "little") + b"{}")
    for path in tmp_path.iterdir():
        assert read_settings(path) is None, path


def test_settings_that_are_too_long_for_jpeg():
    settings = SETTINGS | {"prompt": "star " * 10_000}
    with pytest.raises(InputError, match=r"^image_format: got settings of \d+ bytes, .* JPEG"):
        encode(IMAGE, settings, "jpeg")
    for image_format in ("png", "webp"):
        assert len(encode(IMAGE, settings, image_format)) > 50_000


def test_formats_and_qualities_are_checked():
    check_format("webp", 0)
    check_format("latents")
    with pytest.raises(InputError, match=r"^image_format: got 'gif', expected one of"):
        check_format("gif")
    with pytest.raises(InputError, match=r"^quality: got 101"):
        check_format("jpeg", 101)
    with pytest.raises(InputError, match=r"^quality: got 90 for png, expected webp or jpeg"):
        check_format("png", 90)


def test_options_are_read_from_every_format(tmp_path):
    @dataclasses.dataclass
    class Options:
        prompt: tuple[str, ...] = ()
        steps: int = 3
        seed: int = 0

    for image_format in ("webp", "jpeg"):
        path = write(tmp_path / "a", IMAGE, image_format)
        options, stored = with_settings(Options(), path, {"seed"})
        assert options == Options(("a naïve ring",), 25, 0)
        assert stored == SETTINGS
    with pytest.raises(InputError, match="no such file"):
        with_settings(Options(), tmp_path / "none.webp", ())
