"""The generate command with models that enlarge images."""

import json

import cascade_files
import numpy as np
from PIL import Image

from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.cli import main
from jaxdiff.generation.png_files import read_settings


def generate(model, output, *arguments):
    """Run the command in this process; returns its exit code."""
    return main.run("generate", [*arguments, "--model", str(model), "--output", str(output)])


def test_models_that_enlarge_images(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    write_pipeline(first, cascade_files.first(tmp_path / "a"))
    write_pipeline(second, cascade_files.second(tmp_path / "b"))
    then = ("--then", f"{second}:steps=2,noise_level=30,guidance=none")
    assert generate(first, tmp_path / "out", "a ring", *then) == 0
    (path,) = (tmp_path / "out").glob("*.png")
    settings = read_settings(path)
    (stage,) = settings["then"]
    assert stage.pop("model").startswith("second ")
    assert stage == {"steps": 2, "noise_level": 30, "guidance": "none"}
    with Image.open(path) as drawn:
        assert drawn.size == (16, 16)
    assert generate(first, tmp_path / "out", "--from", str(path)) == 2
    assert "(--then), expected those options" in capsys.readouterr().err
    assert generate(first, tmp_path / "out", "--from", str(path), *then) == 0
    assert list((tmp_path / "out").glob("*.png")) == [path]
    # The same in two commands, but for the rounding of pixels between them.
    assert generate(first, tmp_path / "low", "a ring") == 0
    (low,) = (tmp_path / "low").glob("*.png")
    own = ("--image", str(low), "--noise-level", "30", "--steps", "2", "--guidance", "none")
    assert generate(second, tmp_path / "high", "a ring", *own) == 0
    (high,) = (tmp_path / "high").glob("*.png")
    with Image.open(path) as one, Image.open(high) as two:
        difference = np.asarray(one, int) - np.asarray(two, int)
    assert np.abs(difference).mean() < 4
    for bad, message in (
        (f"{second}:noise_level=-1", "noise_level: got -1"),
        (f"{second}:noise_levels=1", "got 'noise_levels'"),
        (str(first), "then: got first, which is DeepFloyd IF, expected"),
        (str(tmp_path / "none"), "then: got"),
    ):
        assert generate(first, tmp_path / "out", "a ring", "--then", bad) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_prior_and_its_decoder(tmp_path, capsys):
    prior, decoder = tmp_path / "prior", tmp_path / "decoder"
    write_pipeline(prior, cascade_files.prior(tmp_path / "a"))
    write_pipeline(decoder, cascade_files.decoder(tmp_path / "b"))
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a ring"}, {"prompt": "a star", "negative_prompt": "a ring"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    then = ("--then", f"{decoder}:steps=2")
    assert generate(prior, tmp_path / "out", "--prompts", str(prompts), *then) == 0
    paths = list((tmp_path / "out").glob("*.png"))
    assert len(paths) == 2
    for path in paths:
        with Image.open(path) as drawn:
            assert drawn.size == (16, 16)
        assert read_settings(path)["prompt"] in ("a ring", "a star")
    capsys.readouterr()
    assert generate(prior, tmp_path / "none", "a ring") == 2
    message = "got Kandinsky 2.2 prior alone, which generates embeddings, expected --then DECODER"
    assert message in capsys.readouterr().err


def test_images_of_a_stage(tmp_path, capsys):
    """What a decoder for inpainting begins with; another file of that name is another image."""
    prior, decoder = tmp_path / "prior", tmp_path / "decoder"
    write_pipeline(prior, cascade_files.prior(tmp_path / "a"))
    write_pipeline(decoder, cascade_files.decoder(tmp_path / "b", in_channels=9))
    photo, hole = tmp_path / "photo.png", tmp_path / "hole.png"
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(photo)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8] = 255
    Image.fromarray(mask).save(hole)
    then = ("--then", f"{decoder}:steps=2,image={photo},mask={hole}")
    for _ in range(2):
        assert generate(prior, tmp_path / "out", "a ring", *then) == 0
    (path,) = (tmp_path / "out").glob("*.png")
    (stage,) = read_settings(path)["then"]
    assert stage["image"].startswith("photo.png sha256 ")
    assert stage["mask"].startswith("hole.png sha256 ")
    with Image.open(path) as drawn:
        assert drawn.size == (16, 16)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(photo)
    assert generate(prior, tmp_path / "out", "a ring", *then) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    capsys.readouterr()
    missing = ("--then", f"{decoder}:image={tmp_path / 'none.png'},mask={hole}")
    assert generate(prior, tmp_path / "out", "a ring", *missing) == 2
    assert "none.png" in capsys.readouterr().err.splitlines()[-1]
