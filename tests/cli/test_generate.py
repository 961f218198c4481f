"""The generate command on a tiny model: files, resuming, JSON, a sentence for each mistake."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import generate_command as generate_command_in_process
import numpy as np
import originals
import pytest
import tiny
from generate_command import generate, load_once, stderr
from PIL import Image

import jaxdiff
from jaxdiff.checkpoints.components import read_component, write_component
from jaxdiff.checkpoints.lora_names import files
from jaxdiff.cli import generate as generate_command
from jaxdiff.cli import main
from jaxdiff.generation import manifest, png_files, runner
from jaxdiff.generation.manifest import Manifest
from jaxdiff.generation.png_files import read_settings
from jaxdiff.models.autoencoder_tiny import AutoencoderTiny
from jaxdiff.models.build import param_dict, replace_weights

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def batch_job(model, tmp_path_factory):
    """Three prompts drawn from a file in batches of two: the output folder and the file."""
    folder = tmp_path_factory.mktemp("job")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "a ring"}\n{"prompt": "a star", "seed": 9}\n'
        '{"prompt": "a ring", "guidance_scale": 1, "negative_prompt": "star"}\n'
    )
    arguments = ("--prompts", str(prompts), "--batch-size", "2", "--seed", "4")
    assert generate(model, folder / "out", *arguments) == 0
    return folder / "out", arguments


def test_the_model_is_shared_by_a_mesh(model, tmp_path, capsys):
    command = ["a ring", "--model", str(model), "--output", str(tmp_path), "--steps", "1", "--json"]
    assert main.run("generate", [*command, "--mesh", "fsdp=2,guidance=2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == "8 x cpu (mesh data=2,fsdp=2,guidance=2,tensor=1)"
    assert [pathlib.Path(name).parent for name in report["images"]] == [tmp_path]


def test_text_encoders_are_offloaded(model, tmp_path, capsys):
    """The same images, which a job without the option finds again."""
    command = ["a ring", "--model", str(model), "--output", str(tmp_path), "--steps", "1", "--json"]
    assert main.run("generate", [*command, "--offload", "text"]) == 0
    assert json.loads(capsys.readouterr().out)["offload"] == "text"
    assert main.run("generate", command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["offload"], report["skipped"], report["count"]) == (None, 1, 1)
    assert main.run("generate", [*command, "--offload", "vae"]) == 2
    assert "offload: got 'vae', expected one of text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("fsdp=3", "mesh: got fsdp 3.* whose product divides 8, the number of devices"),
        ("foo=2", "mesh: got 'foo', expected one of data, fsdp, guidance, tensor"),
        ("fsdp", "mesh: got 'fsdp', expected axes and sizes, such as fsdp=4,tensor=2"),
        ("tensor=0", r"mesh\.tensor: got 0"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_sentence(model, tmp_path, capsys, mesh, message):
    command = ["a ring", "--model", str(model), "--output", str(tmp_path / "out")]
    assert main.run("generate", [*command, "--mesh", mesh]) == 2
    assert re.search(f"^generate: {message}", stderr(capsys))
    assert not (tmp_path / "out").exists()


def test_a_batch_job_writes_every_image_with_its_settings(batch_job):
    output, _ = batch_job
    assert sorted(p.name for p in output.glob("*.png")) == [
        "000000_a-ring_4.png",
        "000001_a-star_9.png",
        "000002_a-ring_4.png",
    ]
    settings = read_settings(output / "000002_a-ring_4.png")
    assert len(settings.pop("weights")) == 12
    assert settings == {
        "model": "tiny",
        "prompt": "a ring",
        "negative_prompt": "star",
        "guidance_scale": 1,
        "seed": 4,
        "steps": 4,
        "sampler": "ddim",
        "timestep_spacing": None,
        "height": 16,
        "width": 16,
    }


def test_a_job_with_other_settings_has_files_of_its_own(batch_job, model, capsys):
    output, arguments = batch_job
    before = {path: path.read_bytes() for path in output.glob("*.png")}
    assert generate(model, output, *arguments, "--steps", "2") == 0
    assert "3 images (3 beside images of other settings)" in stderr(capsys)
    added = {*output.glob("*.png")} - before.keys()
    assert len(added) == 3
    assert all(path.read_bytes() == content for path, content in before.items())
    for path in added:
        path.unlink()


def test_prompts_of_one_name_have_a_file_each(model, tmp_path, capsys):
    for skipped, renamed in ((0, 1), (2, 0)):
        assert generate(model, tmp_path, "a ring!", "a ring?", "a ring!", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["skipped"], report["renamed"]) == (skipped, renamed)
        first, second = (pathlib.Path(name) for name in report["images"])
        assert first.name == "a-ring_0.png"
        assert re.fullmatch(r"a-ring_0-[0-9a-f]{8}\.png", second.name)
        assert [read_settings(p)["prompt"] for p in (first, second)] == ["a ring!", "a ring?"]


def test_a_batch_job_goes_on_where_it_stopped(batch_job, model, capsys):
    output, arguments = batch_job
    (output / "000001_a-star_9.png").unlink()
    kept = output / "000000_a-ring_4.png"
    before = kept.stat().st_mtime_ns
    assert generate(model, output, *arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["skipped"] == 2
    assert report["seeds"] == [4, 9, 4]
    assert [pathlib.Path(p).name for p in report["images"]] == [
        "000000_a-ring_4.png",
        "000001_a-star_9.png",
        "000002_a-ring_4.png",
    ]
    assert kept.stat().st_mtime_ns == before
    assert (output / "000001_a-star_9.png").exists()


def test_former_spellings_resume_and_both_together_are_refused(model, tmp_path, addons, capsys):
    """A picture whose settings have former names is the same picture."""
    embedding, _ = addons
    output = tmp_path / "out"
    former = ("--literal", "--embedding", str(embedding), "--timesteps", "leading")
    options = ("--no-prompt-syntax", "--textual-inversion", str(embedding))
    options += ("--timestep-spacing", "leading")
    assert generate(model, output, "a ring", *former, "--guidance", "auto:") == 2
    assert "guidance_model: got none" in stderr(capsys)
    assert generate(model, output, "a ring", *former, "--guidance", "cfg-zero") == 0
    (path,) = output.glob("*.png")
    settings = read_settings(path)
    assert settings["guidance"] == "cfg-zero-star"
    old = {"embeddings": settings.pop("textual_inversions"), "guidance": "cfg-zero"}
    old["timesteps"] = settings.pop("timestep_spacing")
    with Image.open(path) as image:
        png_files.write_png(path, image.copy(), settings | old)
    before = path.read_bytes()
    for arguments in (former, options):
        for rule in ("cfg-zero", "cfg-zero-star"):
            assert generate(model, output, "a ring", *arguments, "--guidance", rule) == 0
    assert path.read_bytes() == before
    capsys.readouterr()
    assert generate(model, output, "a ring", *former, *options) == 2
    error = stderr(capsys)
    assert error.startswith("generate: prompt-syntax: got --literal and --no-prompt-syntax")


def test_an_interruption_says_how_many_are_done(model, tmp_path, capsys, monkeypatch):
    def write(path, image, settings):
        if path.stem.startswith("a-star"):
            raise KeyboardInterrupt
        png_files.write_png(path, image, settings)

    monkeypatch.setattr(runner, "write_png", write)
    assert generate(model, tmp_path, "a ring", "a star", "--batch-size", "1") == 130
    said = "generate: interrupted, 1 of 2 images are done; the same command resumes\n"
    assert stderr(capsys) == said


def test_an_image_is_made_again_from_its_settings(model, tmp_path, addons, capsys):
    words = ("a (ring:1.2)", "--negative-prompt", "star", "--guidance", "apg:eta=0.2")
    numbers = ("--seed", "5", "--steps", "3", "--guidance-scale", "2", "--clip-skip", "1")
    others = ("--timestep-spacing", "karras", "--no-prompt-syntax", "--hires-scale", "1.5")
    (path,) = added_by(model, tmp_path / "a", *words, *numbers, *others)
    (again,) = added_by(model, tmp_path / "b", "--from", str(path))
    assert again.name == path.name
    assert again.read_bytes() == path.read_bytes()
    assert not added_by(model, tmp_path / "b", "--from", str(path))
    changed = ("--seed", "6", "--prompt-syntax")
    (other,) = added_by(model, tmp_path / "b", "--from", str(path), *changed)
    before = read_settings(path)
    assert before.pop("prompt_syntax") is False
    assert read_settings(other) == before | {"seed": 6}
    (new,) = added_by(model, tmp_path / "b", "a star", "--from", str(path))
    assert read_settings(new)["prompt"] == "a star"
    more = added_by(model, tmp_path / "m", "--from", str(path), "--num-images", "3")
    assert {read_settings(each)["seed"] for each in more} == {5, 6, 7}
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a star", "seed": 9}\n{"prompt": "a ring"}')
    several = added_by(model, tmp_path / "p", "--from", str(path), "--prompts", str(lines))
    assert {(s["prompt"], s["seed"], s["steps"]) for s in map(read_settings, several)} == {
        ("a star", 9, 3),
        ("a ring", 5, 3),
    }
    _, lora = addons
    (path,) = added_by(model, tmp_path / "c", "a ring", "--lora", f"{lora}:0.1")
    capsys.readouterr()
    assert generate(model, tmp_path / "d", "--from", str(path)) == 2
    assert re.search(
        "^generate: from: got .* loras .*now None .--lora., expected", stderr(capsys), re.M
    )
    assert not added_by(model, tmp_path / "c", "--from", str(path), "--lora", f"{lora}:0.1")
    Image.new("RGB", (9, 9)).save(tmp_path / "foreign.png")
    assert generate(model, tmp_path / "d", "--from", str(tmp_path / "foreign.png")) == 2
    assert "foreign.png, expected an image that jaxdiff generate wrote" in stderr(capsys)


NO_JAX = "import sys; sys.modules['jax'] = None; from jaxdiff.cli.main import main; main()"


def test_a_job_that_is_done_needs_no_jax_and_one_that_is_not_runs(model, tmp_path, capsys):
    own = shutil.copytree(model, tmp_path / "own")
    output, command = tmp_path / "out", ["a ring", "a star", "--json", "--steps", "2"]
    assert generate(own, output, *command) == 0
    first = json.loads(capsys.readouterr().out)
    entries = [
        json.loads(line) for line in pathlib.Path(first["manifest"]).read_text().splitlines()
    ]
    assert [entry["image"] for entry in entries] == ["a-ring_0.png", "a-star_0.png"]

    arguments = ["generate", *command, "--model", str(own), "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "-c", NO_JAX, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert (report["images"], report["skipped"]) == (first["images"], 2)
    assert report.keys() == first.keys()

    def left_to_do():
        assert generate(own, output, *command) == 0
        report = json.loads(capsys.readouterr().out)
        return report["count"] - report["skipped"]

    assert left_to_do() == 0
    (output / "a-star_0.png").unlink()
    assert left_to_do() == 1
    (output / "a-star_0.png").write_bytes(b"cut off")
    assert left_to_do() == 1
    part = read_component(own / "vae")
    path = "decoder.conv_out.bias"
    replace_weights(part.module, {path: param_dict(part.module)[path] + 0.1})
    write_component(own / "vae", part)
    load_once.cache_clear()
    assert left_to_do() == 2


def test_a_damaged_manifest_or_image_is_work_left_to_do(model, tmp_path, capsys):
    output, command = tmp_path / "out", ("a ring", "a star", "--steps", "2", "--json")
    assert generate(model, output, *command) == 0
    whole = pathlib.Path(json.loads(capsys.readouterr().out)["manifest"])
    lines = whole.read_text().splitlines(keepends=True)
    star = output / "a-star_0.png"
    for content in ("", lines[0], lines[1] + lines[0], "{", "[]\n"):
        star.unlink()
        whole.write_text(content)
        assert generate(model, output, *command) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["count"], report["skipped"], star.exists()) == (2, 1, True)
    star.write_bytes(star.read_bytes()[:-200])
    assert generate(model, output, *command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["skipped"], report["renamed"]) == (1, 1), "nothing is overwritten"


def test_a_manifest_covers_linked_folders_and_settings_beside_an_adapter(tmp_path):
    real, folder = tmp_path / "real", tmp_path / "model"
    real.mkdir()
    folder.mkdir()
    (real / "weights").write_text("1")
    (folder / "unet").symlink_to(real)
    before = Manifest.of(tmp_path, {}, [folder]).path
    (real / "weights").write_text("12")
    assert Manifest.of(tmp_path, {}, [folder]).path != before
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).touch()
    options = generate_command.Options(lora=(f"{tmp_path}/adapter_model.safetensors:0.5",))
    found = generate_command._files(options, [])
    assert tmp_path / "adapter_config.json" in found


def test_a_folder_of_very_many_files_is_no_model_to_compare(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.txt").touch()
    assert Manifest.of(tmp_path, {}, [tmp_path]).is_comparable
    monkeypatch.setattr(manifest, "MAX_FILES", 3)
    assert not Manifest.of(tmp_path, {}, [tmp_path]).is_comparable


def test_a_long_job_is_listed_in_its_manifest_alone(batch_job, model, capsys, monkeypatch):
    output, arguments = batch_job
    monkeypatch.setattr(generate_command, "LISTED", 2)
    assert generate(model, output, *arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["count"], report["images"], report["seeds"]) == (3, [], [])
    assert len(pathlib.Path(report["manifest"]).read_text().splitlines()) == 3


@pytest.mark.filterwarnings("always:from")
def test_the_prediction_type_of_a_file(model, tmp_path, capsys, monkeypatch):
    asked, once = [], load_once

    def load_file(name, dtype=None, prediction_type=None, **others):
        asked.append(prediction_type)
        return once(str(model))

    with monkeypatch.context() as patch:
        patch.setattr(generate_command_in_process, "load_once", load_file)
        option = ("--prediction-type", "v_prediction")
        (path,) = added_by(model, tmp_path / "a", "a ring", *option)
        assert not added_by(model, tmp_path / "a", "--from", str(path))
    assert asked == ["v_prediction"] * 2
    assert read_settings(path)["prediction_type"] == "v_prediction"
    with Image.open(path) as image:
        assert "Prediction type: v_prediction" in image.info["parameters"]
    copy = shutil.copytree(model, tmp_path / "other")
    capsys.readouterr()
    (other,) = added_by(copy, tmp_path / "b", "--from", str(path))
    assert "whose prediction_type v_prediction does not count for" in capsys.readouterr().err
    assert "prediction_type" not in read_settings(other)
    assert generate(model, tmp_path / "b", "a ring", *option) == 2
    assert "expected a single file" in capsys.readouterr().err


def test_json_has_the_promised_keys(batch_job, model, capsys):
    output, arguments = batch_job
    generate(model, output, *arguments, "--json")
    keys = {"images", "seeds", "compile_s", "sample_s", "images_per_s", "device"}
    assert keys <= set(json.loads(capsys.readouterr().out))


def test_the_same_prompt_with_another_scale_just_works(model, tmp_path, capsys):
    """Nothing is overwritten, not even what another program wrote."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a-star_0.png")
    for scale in ("2", "3", "2"):
        for prompt in ("a ring", "a star"):
            assert generate(model, tmp_path, prompt, "--guidance-scale", scale) == 0
    assert "0 images (1 already exists)" in stderr(capsys)
    files = sorted(tmp_path.glob("*.png"))
    assert [path.name[:8] for path in files] == ["a-ring_0"] * 2 + ["a-star_0"] * 3
    scales = [(s := read_settings(path)) and s["guidance_scale"] for path in files]
    assert (set(scales[:2]), set(scales[2:])) == ({2, 3}, {None, 2, 3})
    with Image.open(tmp_path / "a-star_0.png") as kept:
        assert kept.size == (9, 9)


def test_names_of_earlier_versions_are_known(batch_job, model, capsys):
    output, arguments = batch_job
    paths = sorted(output.glob("*.png"))
    for path in paths:
        path.rename(path.with_name(re.sub("_a-[a-z]+", "", path.name)))
    generate(model, output, *arguments, "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["skipped"], report["renamed"]) == (3, 0)
    for path in paths:
        path.with_name(re.sub("_a-[a-z]+", "", path.name)).rename(path)


def test_an_image_does_not_depend_on_its_neighbours(batch_job, model, tmp_path):
    output, _ = batch_job
    assert generate(model, tmp_path, "a star", "--seed", "9", "--batch-size", "1") == 0
    paths = tmp_path / "a-star_9.png", output / "000001_a-star_9.png"
    alone, beside = map(Image.open, paths)
    differences = [abs(a - b) for a, b in zip(alone.tobytes(), beside.tobytes(), strict=True)]
    assert max(differences) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prompt: got none, expected"),
        (["a", "--prompts", "x.txt"], "prompt: got both a PROMPT and --prompts"),
        (["--prompts", "none.txt"], "prompts: got none.txt"),
        (["a", "--num-images", "0"], "num_images: got 0"),
        (["a", "--sampler", "dpmp"], "sampler: got 'dpmp'"),
        (["a", "--steps", "1001"], "steps: got 1001"),
        (["a", "--height", "3"], "height: got 3, expected a multiple of 2"),
        (["a", "--dtype", "int8"], "dtype: got 'int8'"),
        (["a", "--prompt-2", "b"], "prompt_2: got 'b', expected none for a model without a second"),
        (["a", "--negative-prompt-2", "b"], "negative_prompt_2: got 'b', expected none for"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(model, tmp_path, capsys, arguments, message):
    assert generate(model, tmp_path / "out", *arguments) == 2
    error = stderr(capsys)
    assert error.startswith(f"generate: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_named(tmp_path, capsys):
    assert generate(tmp_path / "nothing", tmp_path / "out", "a") == 2
    assert "nothing" in stderr(capsys)


def run_process(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate.py", "a", "--no-such-option"], "--no-such-option"),
        (["-m", "jaxdiff", "generat"], "jaxdiff: command: got 'generat'"),
    ],
)
def test_the_process_exits_with_2_and_no_traceback(arguments, said):
    result = run_process(*arguments)
    assert result.returncode == 2
    assert said in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_help_lists_the_commands():
    result = run_process("-m", "jaxdiff", "--help")
    assert result.returncode == 0
    assert "generate" in result.stdout


def picture(path, size=(16, 16)):
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    return str(path)


@pytest.fixture
def addons(tmp_path):
    """A textual inversion and a LoRA for the model."""
    embedding, lora = tmp_path / "word.safetensors", tmp_path / "style.safetensors"
    write_addons(embedding, lora, 1.0)
    return embedding, lora


def write_addons(embedding, lora, value):
    originals.write_safetensors(embedding, {"emb_params": np.full((1, 8), value, np.float32)})
    factors = {"down": (1, 4, 3, 3), "up": (8, 1, 1, 1)}
    originals.write_safetensors(
        lora,
        {
            f"lora_unet_conv_in.lora_{role}.weight": np.full(shape, value, np.float32)
            for role, shape in factors.items()
        },
    )


def test_images_in_two_passes_and_with_files_beside(model, tmp_path, addons):
    """Options that need more than words: each leaves its trace in the picture's settings."""
    image, mask = picture(tmp_path / "a.png"), picture(tmp_path / "m.png")
    embedding, lora = addons
    cases = {
        "image": ["--image", image, "--strength", "0.5"],
        "mask": ["--image", image, "--mask", mask],
        "hires_scale": ["--hires-scale", "1.5"],
        "refiner": ["--refiner", str(model), "--refiner-start", "0.5"],
        "loras": ["--lora", f"{lora}:0.1"],
        "textual_inversions": ["--textual-inversion", str(embedding)],
        "clip_skip": ["--clip-skip", "1"],
        "prompt_syntax": ["--no-prompt-syntax"],
    }
    for name, arguments in cases.items():
        output = tmp_path / name
        assert generate(model, output, "a (ring:1.2)", *arguments) == 0
        (path,) = output.glob("*.png")
        assert name in read_settings(path)
        with Image.open(path) as drawn:
            assert drawn.size == ((24, 24) if name == "hires_scale" else (16, 16))
    assert read_settings(path)["prompt_syntax"] is False


def test_a_job_with_other_addons_of_the_same_name_is_another_job(model, tmp_path, addons):
    embedding, lora = addons
    output = tmp_path / "out"
    both = ("--lora", f"{lora}:0.1", "--textual-inversion", str(embedding))
    assert generate(model, output, "a ring", *both) == 0
    (path,) = output.glob("*.png")
    settings = read_settings(path)
    ((name, scale),) = settings["loras"].items()
    assert (name, scale) == (f"style {hashlib.sha256(lora.read_bytes()).hexdigest()[:12]}", 0.1)
    digest = hashlib.sha256(embedding.read_bytes()).hexdigest()[:12]
    assert settings["textual_inversions"] == [f"word {digest}"]
    before = path.read_bytes()
    assert not added_by(model, output, "a ring", *both)  # resumed: nothing is drawn
    for arguments in (both[:2], both[2:]):
        assert len(added_by(model, output, "a ring", *arguments)) == 1
    old = lora.read_bytes()
    write_addons(embedding, lora, 2.0)
    assert len(added_by(model, output, "a ring", *both)) == 1
    lora.write_bytes(old)
    (last,) = added_by(model, output, "a ring", *both)
    assert settings["loras"] == read_settings(last)["loras"]
    assert settings["textual_inversions"] != read_settings(last)["textual_inversions"]
    assert path.read_bytes() == before


def test_a_vae_of_its_own_is_in_the_settings(model, tmp_path, capsys):
    for seed, name in enumerate(("a", "b")):
        part = tiny.random_component(AutoencoderTiny, tiny.TAESD, seed=seed)
        write_component(tmp_path / name / "taesd", part)
    output = tmp_path / "out"
    vae = ("--vae", str(tmp_path / "a/taesd"))
    (plain,) = added_by(model, output, "a star")
    (path,) = added_by(model, output, "a star", *vae)
    assert plain.read_bytes() != path.read_bytes()
    settings = read_settings(path)
    assert re.fullmatch("taesd [0-9a-f]{12}", settings["vae"])
    assert settings["weights"] != read_settings(plain)["weights"]
    with Image.open(path) as image:
        assert ", VAE: taesd, " in image.info["parameters"]
    assert not added_by(model, output, "a star", *vae)
    assert not added_by(model, output, "--from", str(path), *vae)
    other = ("--vae", str(tmp_path / "b/taesd"))
    capsys.readouterr()
    assert generate(model, output, "--from", str(path)) == 2
    assert re.search(r"generate: from: got .* vae 'taesd .*\(--vae\)", capsys.readouterr().err)
    (again,) = added_by(model, output, "--from", str(path), *other)
    assert read_settings(again)["vae"] != settings["vae"]
    shutil.copytree(tmp_path / "b/taesd", tmp_path / "a/taesd", dirs_exist_ok=True)
    assert generate(model, output, "a star", *vae) == 0  # the image of the other is there
    write_component(
        tmp_path / "a/taesd", tiny.random_component(AutoencoderTiny, tiny.TAESD, seed=0)
    )
    refiner = ("--refiner", str(model), "--refiner-start", "0.5")
    (refined,) = added_by(model, output, "a star", *vae, *refiner)
    assert read_settings(refined)["refiner"] == f"tiny {settings['weights']}"
    assert generate(model, output, "a star", "--vae", str(tmp_path)) == 2
    assert capsys.readouterr().err.endswith("without vae/ or config.json, expected a VAE\n")


def added_by(model, output, *arguments):
    """The files that the command adds to `output`."""
    before = set(output.glob("*.png"))
    assert generate(model, output, *arguments) == 0
    return set(output.glob("*.png")) - before


def test_another_vae_or_refiner_of_the_same_name_is_another_model(model, tmp_path):
    """Networks count by what they hold, not by where they lie."""
    names = ("retrained/tiny", "same/tiny")
    retrained, same = (shutil.copytree(model, tmp_path / name) for name in names)
    part = read_component(retrained / "vae")
    weights = param_dict(part.module)
    replace_weights(part.module, {path: 2 * weights[path] for path in ("decoder.conv_out.bias",)})
    write_component(retrained / "vae", part)
    out = tmp_path / "out"
    assert [len(added_by(each, out, "a ring")) for each in (model, same, retrained)] == [1, 0, 1]
    refiners = [("--refiner", str(each)) for each in (model, same, retrained)]
    assert [len(added_by(model, tmp_path / "two", "a ring", *each)) for each in refiners] == [
        1,
        0,
        1,
    ]


def test_the_settings_of_an_adapter_count_too(tmp_path):
    """PEFT keeps alpha beside the weights."""
    path, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    path.write_bytes(b"weights")
    digests = {png_files.file_digest(*files(tmp_path))}
    for alpha in (1, 2):
        beside.write_text(f'{{"lora_alpha": {alpha}}}')
        digests |= {png_files.file_digest(*files(source)) for source in (tmp_path, path)}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "no.png"], "image: got no.png (No such file or directory)"),
        (["--lora", "no.safetensors"], "no.safetensors: got no such file"),
        (["--hires-scale", "2", "--refiner", "x"], "hires_scale: got it together with a refiner"),
        (["--hires-scale", "90"], "hires_scale: got 90.0"),
        (["--hires-scale", "2", "--hires-strength", "2"], "hires_strength: got 2.0"),
    ],
)
def test_mistakes_with_files_are_one_sentence(model, tmp_path, capsys, arguments, message):
    assert generate(model, tmp_path, "a ring", *arguments) == 2
    assert message in stderr(capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate a --sampler dpmp", "sampler: got 'dpmp', expected one of"),
        ("generate a --sampler euler --eta 0.5", "eta: got 0.5 with sampler 'euler'"),
        ("generate a --guidance cgf", "guidance: got 'cgf', expected one of"),
        ("generate a --guidance cfg+rescal", "guidance: got 'rescal', expected one of"),
        ("generate a --timestep-spacing karas", "timestep_spacing: got 'karas', expected one of"),
        ("generate (a:1000)", "prompt: got weight 1000"),
        ("generate --prompts {file}", "{file}:2: steps: got 1001"),
        (
            "generate a --guidance-model x --guidance cfg",
            "guidance_model: got one with guidance cfg",
        ),
        ("generate a --refiner {file}", "refiner: got {file} (a file that ends in .jsonl)"),
        ("generate a --lora no.safetensors", "no.safetensors: got no such file"),
        ("generate a --textual-inversion no.pt", "no.pt: got no such file, expected a textual"),
        ("generate a --classifier no --classifier-scale 1", "classifier: got no (no such folder)"),
        ("strip a --sampler dpmp", "sampler: got 'dpmp', expected one of"),
        ("evaluate --guidance cgf", "guidance: got 'cgf', expected one of"),
        ("sweep a --samplers euler dpmp", "samplers: got 'dpmp', expected one of"),
        ("sweep a --guidance cgf", "guidance: got 'cgf', expected one of"),
    ],
)
def test_what_suits_no_model_shows_before_one_is_read(
    tmp_path, capsys, monkeypatch, command, message
):
    monkeypatch.setattr(jaxdiff, "load", lambda *args, **options: pytest.fail("a model is read"))
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 1001}')
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    name, *arguments = command.format(file=file).split()
    message = message.format(file=file)
    assert main.run(name, [*arguments, "--output", str(tmp_path / "out.png")]) == 2
    error = stderr(capsys)
    assert error.startswith(f"{name}: {message}")
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def mixed_job(model, tmp_path_factory):
    """A file whose lines begin with words, with pictures of two sizes and with a mask.

    One has steps of its own.
    """
    folder = tmp_path_factory.mktemp("mixed")
    picture(folder / "a.png")
    picture(folder / "wide.png", (24, 16))
    Image.open(folder / "a.png").rotate(90).save(folder / "b.png")
    picture(folder / "mask.png")
    lines = [
        {"image": "a.png", "strength": 0.5},
        {},
        {"image": "b.png", "strength": 0.5},
        {"image": "wide.png"},
        {"image": "a.png", "mask": "mask.png"},
        {},
        {"steps": 2},
    ]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "a ring", **line}) + "\n" for line in lines))
    arguments = ("--prompts", str(prompts), "--batch-size", "8")
    assert generate(model, folder / "out", *arguments) == 0
    return folder, arguments


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_lines_begin_with_images_of_their_own(mixed_job, model, tmp_path):
    """Every line is the picture that its own command draws, whatever its neighbours."""
    folder, _ = mixed_job
    alone = {
        0: ["--image", str(folder / "a.png"), "--strength", "0.5"],
        1: [],
        2: ["--image", str(folder / "b.png"), "--strength", "0.5"],
        3: ["--image", str(folder / "wide.png")],
        4: ["--image", str(folder / "a.png"), "--mask", str(folder / "mask.png")],
        6: ["--steps", "2"],
    }
    drawn = [pixels(folder / "out" / f"{i:06d}_a-ring_0.png") for i in range(7)]
    for number, arguments in alone.items():
        output = tmp_path / str(number)
        assert generate(model, output, "a ring", *arguments) == 0
        assert abs(pixels(output / "a-ring_0.png") - drawn[number]).max() <= 1
    assert np.array_equal(drawn[1], drawn[5])
    assert drawn[3].shape == (16, 24, 3)
    for other in (1, 2, 4, 6):
        assert abs(drawn[0] - drawn[other]).max() > 1


def test_settings_tell_the_images_apart(mixed_job):
    folder, _ = mixed_job
    settings = [read_settings(folder / "out" / f"{i:06d}_a-ring_0.png") for i in range(6)]
    assert [s.get("strength") for s in settings] == [0.5, None, 0.5, 0.8, 1.0, None]
    named = [s.get("image", "").split(" ")[0] for s in settings]
    assert named == ["a.png", "", "b.png", "wide.png", "a.png", ""]
    assert settings[0]["image"] == settings[4]["image"]
    assert settings[4]["mask"].startswith("mask.png ")


def test_another_image_under_the_same_name_is_noticed(mixed_job, model, capsys):
    folder, arguments = mixed_job
    assert generate(model, folder / "out", *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 7
    kept = (folder / "b.png").read_bytes()
    picture(folder / "b.png")
    assert generate(model, folder / "out", *arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["skipped"], report["renamed"]) == (6, 1)
    (folder / "b.png").write_bytes(kept)


def test_an_image_of_words_is_not_one_that_began_with_an_image(model, tmp_path):
    image, output = picture(tmp_path / "a.png"), tmp_path / "out"
    both = [added_by(model, output, "a ring", *each) for each in (["--image", image], [])]
    assert [*map(len, both)] == [1, 1]


def test_one_bad_image_does_not_stop_a_job(model, tmp_path, capsys):
    picture(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    bad = {
        "none.png": "No such file or directory",
        "prompts.jsonl": "not an image",
        ".": "Is a directory",
        "cut.png": "truncated",
    }
    lines = [{"image": name} for name in bad] + [{"image": "a.png", "mask": "m.png"}, {}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "a", **line}) for line in lines))
    assert generate(model, tmp_path / "out", "--prompts", str(file), "--json") == 2
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["000005_a_0.png"]
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert (len(report["images"]), report["failed"]) == (1, 5)
    errors = [
        f"generate: {file}:{line}: image: got {tmp_path / name} ({reason}), expected an image file"
        for line, (name, reason) in enumerate(bad.items(), 1)
    ]
    mask = f"generate: {file}:5: mask: got {tmp_path / 'm.png'} (No such file or directory)"
    assert said.err.splitlines()[:4] == errors
    assert said.err.splitlines()[4].startswith(mask)
    assert said.err.splitlines()[5] == (
        "generate: got 5 of 6 images that could not be generated, expected none; the same command "
        "tries them again"
    )


def test_an_image_that_is_not_finite_is_not_written(model, tmp_path, capsys):
    broken = shutil.copytree(model, tmp_path / "broken")
    part = read_component(broken / "text_encoder")
    weights, path = param_dict(part.module), part.module.token_embedding
    (token,) = load_once(str(model))._tokenizers.first.ids("star")
    replace_weights(part.module, {path: weights[path].at[token].set(np.nan)})
    write_component(broken / "text_encoder", part)
    for two_passes in ([], ["--hires-scale", "1.5"]):
        output = tmp_path / f"out{len(two_passes)}"
        assert generate(broken, output, "a ring", "a star", *two_passes) == 2
        assert [path.name for path in output.glob("*.png")] == ["a-ring_0.png"]
        error = stderr(capsys)
        assert "generate: a-star_0: got numbers that are not finite from step 0 of 4, exp" in error
        assert "got 1 of 2 images that could not be generated" in error


@pytest.mark.parametrize(
    ("line", "arguments", "message"),
    [
        ({"strength": 0.5}, [], r"{file}:2: strength: got 0.5 without an image"),
        ({"mask": "a.png"}, [], r"{file}:2: mask: got a mask without an image"),
        ({"image": "a.png", "strength": 2}, [], r"{file}:2: strength: got 2"),
        ({"image": "a.png", "strength": 0.1}, [], r"{file}:2: steps: got 4 with strength 0.1"),
        ({"guidance_scale": -1}, [], r"{file}:2: guidance_scale: got -1"),
        ({"prompt_2": "b"}, [], r"{file}:2: prompt_2: got 'b', expected none"),
        ({"prompt": "(a:1000)"}, [], r"{file}:2: prompt: got weight 1000"),
        ({}, ["--strength", "0.5"], r"strength: got 0.5 without an image"),
        ({}, ["--steps", "1001"], r"steps: got 1001"),
        ({}, ["--seed", "-1"], r"seed: got -1"),
    ],
)
def test_a_mistake_in_a_file_names_its_line(model, tmp_path, capsys, line, arguments, message):
    picture(tmp_path / "a.png")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "a", **line}))
    assert generate(model, tmp_path / "out", "--prompts", str(file), *arguments) == 2
    error = stderr(capsys)
    assert error.startswith("generate: " + message.format(file=file, folder=tmp_path))
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
