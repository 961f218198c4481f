"""From a prompt file to images, as a batch job does it, with images of one colour."""

import csv
import json

import numpy as np
import pytest
from image_jobs import KEY, settings, writing
from PIL import Image

from jaxdiff.generation.image_files import read_settings
from jaxdiff.generation.open_output import open_output
from jaxdiff.generation.outputs import ImageItem
from jaxdiff.generation.prompt_spec import PromptSpec
from jaxdiff.generation.prompt_stream import BadLine, line_images, read_prompts
from jaxdiff.generation.shards import Shard

DEFAULTS = PromptSpec(prompt="", seed=100, num_images=2)


def run(prompts, where, shard=None, **options):
    """What a job of a shard leaves: the numbers of images that it made and of those it has."""
    output, made = open_output(where, key=KEY, shard=shard, prompts=prompts, **options), 0
    with writing(output) as write:
        for line in read_prompts(prompts, shard=shard):
            if isinstance(line, BadLine):
                output.fail_line(line)
                continue
            for planned in line_images(line, DEFAULTS):
                if not output.done(line.index, planned.number):
                    image = np.full((8, 8, 3), planned.seed % 256, np.uint8)
                    own = settings(0) | {"prompt": planned.spec.prompt, "seed": planned.seed}
                    write(ImageItem.of(planned, image, own))
                    made += 1
    return made, len(output.manifest)


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_a_table_becomes_images_in_shards(tmp_path, container):
    path = tmp_path / "p.csv"
    with path.open("w", newline="") as file:
        rows = [["prompt", "seed", "num_images"], ["a star", "", ""], ["a ring", "7", "1"]]
        csv.writer(file).writerows([*rows, ["bad", "x", ""], *[[f"n {i}", "", ""] for i in "abc"]])
    counts = [
        run(path, tmp_path / "out", Shard(i, 2, unit_size=1), container=container) for i in range(2)
    ]
    assert counts == [(4, 4), (5, 5)]
    for i in range(2):
        again = run(path, tmp_path / "out", Shard(i, 2, unit_size=1), container=container)
        assert again == (0, counts[i][1])
    manifests = sorted((tmp_path / "out" / ".jobs" / KEY).glob("*.jsonl"))
    lines = [json.loads(line) for each in manifests for line in each.read_text().splitlines()]
    (error,) = [line for line in lines if "error" in line]
    assert error == {
        "index": 2,
        "number": None,
        "source": f"{path}:4",
        "error": f"{path}:4: seed: got 'x', expected an integer",
    }
    seeds = {(line["index"], line["number"]): line["seed"] for line in lines if "file" in line}
    defaults = {(index, number): 100 + number for index in (0, 3, 4, 5) for number in range(2)}
    assert seeds == {(1, 0): 7} | defaults
    if container == "folder":
        found = tmp_path / "out" / "000000" / "000001_a-ring_7.png"
        assert read_settings(found)["prompt"] == "a ring"
        with Image.open(found) as image:
            assert image.getpixel((0, 0)) == (7, 7, 7)


def test_a_file_of_requests_becomes_an_output_file_and_an_error_file(tmp_path):
    path, where = tmp_path / "requests.jsonl", tmp_path / "out"
    bodies = [{"prompt": "a"}, {"prompt": "b", "n": 3, "output_format": "webp"}, {"n": 2}]
    request = {"method": "POST", "url": "/v1/images/generations"}
    lines = [{"custom_id": f"r{i}", **request, "body": body} for i, body in enumerate(bodies)]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert run(path, where, container="openai") == (4, 4)
    assert run(path, where, container="openai") == (0, 4)
    answers = [json.loads(x) for x in (where / "requests_output.jsonl").read_text().splitlines()]
    assert {a["custom_id"]: len(a["response"]["body"]["data"]) for a in answers} == {
        "r0": 1,
        "r1": 3,
    }
    (error,) = map(json.loads, (where / "requests_error.jsonl").read_text().splitlines())
    assert error["custom_id"] == "r2"
    assert error["error"] == {
        "code": "invalid_request",
        "message": f"{path}:3: body: got no field 'prompt', expected one",
    }
