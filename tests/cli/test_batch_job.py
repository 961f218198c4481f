"""Batch jobs of the generate command, on a tiny model."""

import io
import json
import tarfile

import pytest
import tiny
from generate_command import generate, stderr
from PIL import Image

from jaxdiff.cli import batch_job
from jaxdiff.generation.image_files import read_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        "caption,seed,steps,sampler,height\na ring,7,2,,\na star,,,euler,32\n\na cross,8,,,\n"
    )
    return path


def report(capsys):
    return json.loads(capsys.readouterr().out)


def images(folder, pattern="**/*.png"):
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))


def test_rows_of_a_table_have_options_of_their_own(model, table, tmp_path, capsys):
    columns = ["prompt=caption", "seed=seed", "steps=steps", "sampler=sampler", "height=height"]
    out = tmp_path / "out"
    arguments = ("--prompts", str(table), "--columns", *columns, "--seed", "3", "--json")
    assert generate(model, out, *arguments) == 0
    first = report(capsys)
    assert (first["count"], first["skipped"], first["failed"]) == (3, 0, 0)
    assert images(out) == [
        "000000/000000_a-ring_7.png",
        "000000/000001_a-star_3.png",
        "000000/000002_a-cross_8.png",
    ]
    settings = [read_settings(out / name) for name in images(out)]
    assert [own["steps"] for own in settings] == [2, 4, 4]
    assert settings[1]["sampler"] == "euler"
    with Image.open(out / images(out)[1]) as image:
        assert image.size == (16, 32)
    changed = (out / images(out)[0]).stat().st_mtime_ns
    assert generate(model, out, *arguments) == 0
    again = report(capsys)
    assert (again["count"], again["skipped"], again["images_per_s"]) == (3, 3, None)
    assert (out / images(out)[0]).stat().st_mtime_ns == changed


def test_an_image_of_a_job_is_that_of_its_line_alone(model, table, tmp_path):
    job = ("--prompts", str(table), "--columns", "prompt=caption", "seed=seed", "steps=steps")
    assert generate(model, tmp_path / "job", *job) == 0
    assert generate(model, tmp_path / "one", "a ring", "--seed", "7", "--steps", "2") == 0
    pair = [tmp_path / "job/000000/000000_a-ring_7.png", tmp_path / "one/a-ring_7.png"]
    assert read_settings(pair[0]) == read_settings(pair[1])
    pixels = [Image.open(path).tobytes() for path in pair]
    assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 1


def test_shards_share_a_job_and_write_tars(model, tmp_path, capsys):
    path, out = tmp_path / "p.txt", tmp_path / "out"
    path.write_text("\n".join(f"a ring {i}" for i in range(70)))
    arguments = ("--prompts", str(path), "--steps", "1", "--container", "tar", "--json")
    counts = []
    for shard in ("0/2", "1/2"):
        command = (*arguments, "--shard", shard, "--image-format", "webp", "--quality", "50")
        assert generate(model, out, *command) == 0
        counts.append(report(capsys)["count"])
    assert counts == [64, 6]
    names = []
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as opened:
            names += [each.name for each in opened if each.name.endswith(".webp")]
            first = opened.extractfile(names[-1]).read()
    assert len(set(names)) == 70
    with Image.open(io.BytesIO(first)) as image:
        assert image.format == "WEBP"


def test_requests_of_the_batch_api(model, tmp_path, capsys):
    path, out = tmp_path / "requests.jsonl", tmp_path / "out"
    bodies = [
        {"prompt": "a ring", "n": 2, "num_inference_steps": 2, "size": "16x16"},
        {"prompt": "a star", "model": "another"},
        {"prompt": "a cross", "output_format": "jpeg"},
    ]
    request = {"method": "POST", "url": "/v1/images/generations"}
    lines = [{"custom_id": f"r{i}", **request, "body": body} for i, body in enumerate(bodies)]
    path.write_text("\n".join(["{", *map(json.dumps, lines)]))  # the first line is cut
    assert generate(model, out, "--prompts", str(path), "--json") == 2
    assert report(capsys)["bad_lines"] == 2
    empty = ("--shard", "1/2", "--container", "openai")  # a shard without lines is one too
    assert generate(model, out, "--prompts", str(path), *empty) == 0
    answers = {
        (own := json.loads(line))["custom_id"]: own["response"]["body"]["data"]
        for line in (out / "requests_output.jsonl").read_text().splitlines()
    }
    assert {name: len(data) for name, data in answers.items()} == {"r0": 2, "r2": 1}
    errors = list(map(json.loads, (out / "requests_error.jsonl").read_text().splitlines()))
    assert [each["custom_id"] for each in errors] == [None, "r1"]
    error = errors[1]
    assert "model: got 'another', expected tiny" in error["error"]["message"]


def test_bad_lines_are_passed_over_up_to_a_limit(model, tmp_path, capsys):
    path = tmp_path / "p.csv"
    path.write_text("prompt,steps\na,0\na ring,2\nb,x\na star,2\nc,9999\n")
    out = tmp_path / "out"
    assert generate(model, out, "--prompts", str(path), "--max-bad-lines", "3") == 2
    said = stderr(capsys)
    for line, message in ((2, "steps: got 0"), (4, "steps: got 'x'"), (6, "steps: got 9999")):
        assert f"generate: {path}:{line}: {message}" in said
    assert "got 3 images or lines that could not be generated" in said
    assert len(images(out)) == 2
    assert generate(model, tmp_path / "other", "--prompts", str(path), "--max-bad-lines", "1") == 2
    assert "prompts: got 2 lines that cannot be generated, expected at most 1" in stderr(capsys)


def test_a_job_of_lines_with_stages(model, tmp_path, capsys):
    path = tmp_path / "p.csv"
    path.write_text("prompt,seed\na ring,1\na star,2\na cross,3\n")
    job = ("--prompts", str(path), "--hires-scale", "1.5", "--batch-size", "2")
    assert generate(model, tmp_path / "job", *job) == 0
    one = ("a star", "--seed", "2", "--hires-scale", "1.5")
    assert generate(model, tmp_path / "one", *one) == 0
    pair = [tmp_path / "job/000000/000001_a-star_2.png", tmp_path / "one/a-star_2.png"]
    assert read_settings(pair[0]) == read_settings(pair[1])
    pixels = [Image.open(path).tobytes() for path in pair]
    assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 1


def test_latents_are_files_too(model, table, tmp_path):
    job = ("--prompts", str(table), "--columns", "prompt=caption", "--image-format", "latents")
    assert generate(model, tmp_path, *job) == 0
    assert len(images(tmp_path, "**/*.safetensors")) == 3


def test_long_files_are_batch_jobs(model, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_job, "SMALL", 2)
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")
    assert generate(model, tmp_path / "small", "--prompts", str(path), "--steps", "1") == 0
    assert images(tmp_path / "small") == ["000000_a_0.png", "000001_b_0.png"]
    path.write_text("a\nb\nc\n")
    assert generate(model, tmp_path / "long", "--prompts", str(path), "--steps", "1") == 0
    assert images(tmp_path / "long")[2] == "000000/000002_c_0.png"


def test_the_launcher_says_which_shard(model, tmp_path, capsys, monkeypatch):
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")
    monkeypatch.setenv("JAXDIFF_SHARD_INDEX", "1")
    monkeypatch.setenv("JAXDIFF_NUM_SHARDS", "2")
    assert generate(model, tmp_path / "out", "--prompts", str(path), "--steps", "1") == 0
    said = stderr(capsys)
    assert said.startswith("generate: shard 1/2 (")
    assert images(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "2/2"], "shard: got 2/2, expected an index from 0 to 1"),
        (["--container", "zip"], "container: got 'zip', expected one of"),
        (["--container", "openai"], "container: got openai for a file with no requests"),
        (["--columns", "prompt"], "columns: got 'prompt', expected FIELD=COLUMN"),
        (["--image-format", "bmp"], "image_format: got 'bmp', expected one of"),
        (["--quality", "101", "--image-format", "webp"], "quality: got 101"),
        (["--steps", "0"], "steps: got 0"),
        (["--from", "{png}"], "from: got it with a batch job"),
    ],
)
def test_a_mistake_is_one_sentence(model, table, tmp_path, capsys, arguments, message):
    png = tmp_path / "one/a-ring_0.png"
    if "{png}" in arguments:
        assert generate(model, png.parent, "a ring", "--steps", "1") == 0
        capsys.readouterr()
    own = [argument.format(png=png) for argument in arguments]
    columns = [] if "--columns" in own else ["--columns", "prompt=caption"]
    assert generate(model, tmp_path / "out", "--prompts", str(table), *columns, *own) == 2
    error = stderr(capsys)
    assert error.startswith(f"generate: {message}")
    assert error.count("\n") == 1
    assert images(tmp_path / "out") == []
