"""Sweep and evaluate: measures that are right, files that are whole, sweeps that go on."""

import functools
import json
import re
import types

import cascade_files
import numpy as np
import pytest
import tiny
from PIL import Image

import jaxdiff
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.cli import main
from jaxdiff.core.aliases import ACCURACIES
from jaxdiff.evaluation.image_grid import CELL, GAP, LABEL, LINE
from jaxdiff.evaluation.sweep_results import (
    TABLE_MARKER,
    Results,
)
from jaxdiff.scenes.judge import render_generator, standard_prompts

RULES = ("cfg", "cfg-pp")
PROMPTS = ("a ring", "a star")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model on one device with a linear UNet; its programs are shared by all tests."""
    pipe = jaxdiff.load(tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny"))
    return tiny.with_linear_unet(tiny.first_devices(pipe, 1))


def sweep(pipe, output, *arguments):
    """Run the command in this process, on a model that is in memory; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxdiff, "load", lambda name, mesh: pipe)
        return main.run("sweep", [*arguments, "--output", str(output)])


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    """The picture of a sweep of two prompts over rules and scales."""
    output = tmp_path_factory.mktemp("swept") / "rules.png"
    assert sweep(model, output, *PROMPTS, "--scales", "1", "3", "--guidance", *RULES) == 0
    return output


def rows_of(output):
    return json.loads(output.with_suffix(".json").read_text())["cells"]


def test_every_combination_and_scale_has_its_cost(swept):
    """4 steps of two streams, of one at scale 1 of cfg."""
    evaluations = {(c["guidance"], c["scale"]): c.get("evaluations") for c in rows_of(swept)}
    assert evaluations == {("cfg", 1): 4, ("cfg", 3): 8, ("cfg-pp", 1): 8, ("cfg-pp", 3): None}


def test_the_image_has_what_the_model_draws(swept, model):
    canvas = np.asarray(Image.open(swept))
    rows = [(rule, prompt) for rule in RULES for prompt in PROMPTS]
    assert canvas.shape == (LINE + len(rows) * (CELL + GAP), LABEL + 2 * (CELL + GAP), 3)
    for row, column in ((0, 0), (1, 0), (1, 1), (3, 0)):
        rule, prompt = rows[row]
        options = {"guidance": rule, "guidance_scale": (1.0, 3.0)[column], "seed": 0}
        want = model([prompt] * 2, output="numpy", **options).images[0].astype(int)
        top, left = LINE + row * (CELL + GAP), LABEL + column * (CELL + GAP)
        got = canvas[top : top + CELL : CELL // 16, left : left + CELL : CELL // 16]
        assert np.abs(got - want).max() <= 1
    blank = canvas[LINE + 2 * (CELL + GAP) :, LABEL + CELL + GAP :]
    assert np.mean(blank == 255) > 0.99


def test_what_the_model_refuses_is_said(swept):
    table = swept.with_suffix(".md").read_text()
    assert table.startswith(TABLE_MARKER)
    assert "cfg-pp at scale 3: guidance_scale (with guidance cfg-pp): got 3.0, expected" in table
    assert swept.with_name("rules-plot.png").exists()


def test_a_rule_that_needs_another_model(model, tmp_path, capsys):
    output = tmp_path / "autoguidance.png"
    model.set_guidance_model(None)
    arguments = ("a ring", "--scales", "2", "--guidance", "autoguidance", "--steps", "2", "3")
    assert sweep(model, output, *arguments) == 2
    assert "sweep: guidance_model: got none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert sweep(model, output, *arguments, "--guidance-model", "itself") == 0
    assert [c["evaluations"] for c in rows_of(output)] == [4, 6]


ONE = "a large black cross on a white background"


@functools.cache
def renders():
    """Drawings of the standard prompts, among which is `ONE`."""
    prompts = standard_prompts()
    assert ONE in {prompt.text for prompt in prompts}
    return render_generator(prompts)


class Draughtsman:
    """Stands in for a model: draws scenes as they were asked for, each in a second."""

    def __init__(self):
        self.defaults = types.SimpleNamespace(
            height=64, width=64, guidance="cfg", sampler="ddim", steps=4
        )
        self.name, self.fingerprint, self.device_name = "renders", "0", "paper"
        self._draw = renders()
        self.asked, self.steered = [], set()

    def resolve(self, prompts, *, seed, **options):
        return types.SimpleNamespace(seeds=seed)

    def nfe(self, request):
        return 4

    def __call__(self, texts, *, seed, batch_size, guidance_scale, **options):
        self.asked.append((len(texts), batch_size, guidance_scale))
        self.steered.add((options["classifier_scale"], options["clip_scale"]))
        rows = -(-len(texts) // batch_size) * batch_size
        timings = {"total_s": rows + 5.0, "compile_s": 5.0}
        return types.SimpleNamespace(images=self._draw(texts, seed), timings=timings)


def test_a_measured_sweep_judges_every_cell(tmp_path):
    pipe, output = Draughtsman(), tmp_path / "measured.png"
    arguments = (
        ONE,
        "--scales",
        "1",
        "3",
        "--evaluate",
        "--prompt-stride",
        "40",
        "--steps",
        "2",
        "4",
    )
    assert sweep(pipe, output, *arguments, "--measure-speed") == 0
    for cell in rows_of(output):
        assert {share["value"] for share in cell["accuracies"].values()} == {1.0}
        assert {share["error"] for share in cell["accuracies"].values()} == {0.0}
        assert set(cell["measures"]) == {"diversity", "chroma", "clipped", "contrast"}
        assert cell["seconds"] == 1.0
    assert {scale for _, _, scale in pipe.asked} == {1.0, 3.0}
    table = output.with_suffix(".md").read_text()
    assert table.count("1.000 ± 0.000") == 4 * len(rows_of(output)[0]["accuracies"])
    with Image.open(output) as canvas:
        assert canvas.height == LINE + 2 * (CELL + GAP + 2 * LINE)


def test_results_with_former_names_are_resumed(tmp_path):
    pipe, output = Draughtsman(), tmp_path / "a.png"
    arguments = (ONE, "--scales", "1", "3", "--guidance", "cfg-zero-star")
    options = ("--evaluate", "--prompt-stride", "40")
    assert sweep(pipe, output, *arguments, *options) == 0
    path = output.with_suffix(".json")
    stored = json.loads(path.read_text())
    former = {"evaluate": "measured", "prompt_stride": "every", "measure_speed": "timed"}
    former |= {"guidance_model": "guide"}
    old = {former.get(name, name): value for name, value in stored["options"].items()}
    names = {name: old_name for old_name, name in ACCURACIES.items()}
    cells = []
    for row in stored["cells"]:
        accuracies = {names.get(k, k): v for k, v in row["accuracies"].items()}
        rest = {k: v for k, v in row.items() if k != "accuracies"}
        cells.append(rest | {"guidance": "cfg-zero", "shares": accuracies})
    assert "one all right" in cells[0]["shares"]
    path.write_text(json.dumps({"options": old, "cells": cells}))
    pipe.asked.clear()
    assert sweep(pipe, output, *arguments, "--measured", "--every", "40", "--scales", "3") == 0
    assert {count for count, _, _ in pipe.asked} == {1}  # images, but no evaluation
    results = Results.open(path, stored["options"])
    assert [row | {"scale": 3.0} for row in stored["cells"][1:]] == [
        {**point.combination._asdict(), "scale": point.scale, **result}
        for point, result in results.points.items()
        if point.scale == 3
    ]


def test_steering_scales_are_rows_too(tmp_path):
    """Zero steers nothing; many rows have panels of their own in the plot."""
    pipe, output = Draughtsman(), tmp_path / "steered.png"
    scales = ("--classifier-scale", "0", "2", "5", "--clip-scale", "0", "10")
    assert sweep(pipe, output, ONE, "--scales", "1", "3", *scales) == 0
    assert pipe.steered == {(a, b) for a in (None, 2.0, 5.0) for b in (None, 10.0)}
    table = output.with_suffix(".md").read_text()
    assert "guidance cfg, sampler ddim, steps 4 in all rows." in table
    assert "| 5.0 | 10.0 | 3 |" in table
    with Image.open(output.with_name("steered-plot.png")) as plot:
        assert plot.height == 5 * 240  # one for each row but the first


def test_a_sweep_goes_on_where_it_stopped(tmp_path, capsys):
    """What is there stays as it is, what is missing comes back; other options are refused."""
    pipe, output = Draughtsman(), tmp_path / "a.png"
    arguments = (ONE, "--scales", "1", "3", "5", "--evaluate", "--prompt-stride", "40")
    assert sweep(pipe, output, *arguments) == 0
    path = output.with_suffix(".json")
    stored = json.loads(path.read_text())
    stored["cells"][0]["evaluations"] = 123
    lost = stored["cells"].pop(1)
    path.write_text(json.dumps(stored))
    pipe.asked.clear()
    assert sweep(pipe, output, *arguments) == 0
    cells = {cell["scale"]: cell for cell in rows_of(output)}
    assert cells[1]["evaluations"] == 123
    assert cells[3] == lost
    assert set(cells) == {1, 3, 5}
    assert "| 123 |\n" in output.with_suffix(".md").read_text()
    # a picture each of the first and the last, and everything of the one that was lost
    assert [scale for count, _, scale in pipe.asked if count == 1].count(3.0) == 1
    assert [scale for count, _, scale in pipe.asked if count > 1] == [3.0] * (len(pipe.asked) - 3)
    pipe.asked.clear()
    assert sweep(pipe, output, *arguments, "--scales", "1", "7") == 0
    assert {cell["scale"] for cell in rows_of(output)} == {1, 3, 5, 7}
    assert [scale for count, _, scale in pipe.asked if count > 1] == [7.0] * (len(pipe.asked) - 2)
    assert "| 3 |" not in output.with_suffix(".md").read_text()
    before = path.read_bytes()
    capsys.readouterr()
    assert sweep(pipe, output, *arguments, "--seed", "1") == 2
    assert "got results with seed 0 instead of 1, expected the same" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("sweep", ["--prompt-stride", "0"], "sweep: prompt_stride: got 0"),
        ("evaluate", ["--prompt-stride", "0"], "evaluate: prompt_stride: got 0"),
        ("evaluate", ["--prompt", "a castle"], "evaluate: prompt: got 'a castle'"),
        (
            "evaluate",
            ["--num-images", "4"],
            "evaluate: num_images: got 4 without prompt",
        ),
        (
            "evaluate",
            ["--prompt-stride", "2", "--prompt", "a red star"],
            "evaluate: prompt_stride: got 2 with prompt",
        ),
        (
            "sweep",
            ["--output", "."],
            "sweep: output: got ., expected a file name that ends in .png",
        ),
        ("sweep", ["--output", "none.png", "--guidance", "cgf"], "sweep: guidance: got 'cgf'"),
        ("sweep", ["--output", "none.png", "--sampler", "x"], "sweep: samplers: got 'x'"),
        ("sweep", ["--output", "none.png", "--steps", "0"], "sweep: steps: got 0"),
        ("sweep", ["--output", "none.png", "--scales", "-1"], "sweep: scales: got -1"),
        ("sweep", ["--output", "none.png", "--clip-scale", "-1"], "sweep: clip_scales: got -1"),
        ("evaluate", ["--output", "."], "evaluate: .: got a folder, expected a file"),
    ],
)
def test_bad_options(command, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxdiff, "load", lambda model, mesh: Draughtsman())
    assert main.run(command, arguments) == 2
    assert capsys.readouterr().err.startswith(message)


def test_perfect_drawings_are_all_correct(capsys, tmp_path):
    output = tmp_path / "report.json"
    code = main.run(
        "evaluate", ["--model", "renders", "--prompt-stride", "16", "--output", str(output)]
    )
    assert code == 0
    assert "two objects correct" in capsys.readouterr().out
    assert output.exists()


def test_one_prompt_is_evaluated_over_seeds(capsys):
    options = ["--model", "renders", "--prompt", "a red star above a blue ring"]
    assert main.run("evaluate", [*options, "--num-images", "5"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"two objects correct +1.000 ± 0.000  of 5\n", out)
    assert "circle" not in out


def test_a_cascade_is_evaluated_at_the_size_of_its_last_images(tmp_path, capsys):
    for name, parts in {"first": cascade_files.first, "second": cascade_files.second}.items():
        write_pipeline(tmp_path / name, parts(tmp_path / f"of-{name}"))
    second = f"{tmp_path / 'second'}:steps=2"
    arguments = ["--model", str(tmp_path / "first"), "--then", second]
    assert main.run("evaluate", arguments) == 2
    assert capsys.readouterr().err.startswith("evaluate: model: got a default size of 16 x 16")
    assert main.run("evaluate", ["--model", "renders", "--then", second]) == 2
    assert capsys.readouterr().err.startswith("evaluate: then: got")
