"""The report of a generator: seeds, batches, accuracies and their errors, a table."""

import json
import types

import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.evaluation.alignment import (
    Accuracy,
    accuracies,
    diversity,
    evaluate_alignment,
    model_generator,
    subsample,
)

PROMPTS = [types.SimpleNamespace(text=f"grey {value}") for value in range(0, 200, 8)]


class GreyJudge:
    """Images shall be grey, as bright as their prompts say; odd seeds are darker."""

    def score_images(self, prompts, images):
        levels = [int(prompt.text.split()[1]) for prompt in prompts]
        pairs = zip(levels, images, strict=True)
        return [types.SimpleNamespace(all_correct=bool((x == y).all())) for x, y in pairs]

    def standard_prompts(self):
        return PROMPTS

    def parse_prompt(self, text):
        return types.SimpleNamespace(text=text)

    def render_generator(self, prompts, size=None):
        return draw

    def probe_prompts(self, stride=1):
        return PROMPTS[5:7]

    def answers(self, prompts, scores):
        return {"level": [score.all_correct for score in scores], "never asked": []}

    def probe_measures(self, images):
        return {"darkest": float(images.min())}

    def check_model_size(self, height, width):
        if height != width:
            raise InputError("model: got no square")


def draw(texts, seeds):
    levels = [int(t.split()[1]) - s % 2 for t, s in zip(texts, seeds, strict=True)]
    return np.stack([np.full((8, 8, 3), max(level, 0), np.uint8) for level in levels])


@pytest.fixture(scope="module")
def report():
    return evaluate_alignment(draw, GreyJudge(), PROMPTS, batch_size=7, probes=PROMPTS[5:7])


def test_every_second_image_is_correct(report):
    assert dict(report.accuracies) == {"level": Accuracy(value=13 / 25, count=25)}
    assert report.measures["darkest"] == 40
    assert report.measures["chroma"] == 0
    assert report.measures["contrast"] < 1e-12


def test_the_report_is_json_and_a_table(report):
    mapping = json.loads(json.dumps(report.to_mapping()))
    assert mapping["accuracies"]["level"] == {"value": 13 / 25, "count": 25}
    names = ["diversity", "chroma", "clipped", "contrast", "darkest"]
    assert list(mapping["measures"]) == names
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines] == ["level", *names]
    assert lines[0].endswith("0.520 ± 0.100  of 25")


def test_the_error_is_binomial():
    assert Accuracy(value=0.5, count=100).error == pytest.approx(0.05)
    assert accuracies({"a": [True, False], "b": []}) == {"a": Accuracy(value=0.5, count=2)}


def test_diversity_is_that_of_the_seeds():
    def same(texts, seeds):
        return np.zeros((len(texts), 64, 64, 3), np.uint8)

    assert diversity(same, PROMPTS[:3]) == 0
    # of four seeds two are darker by one: four of six pairs differ by 1/255
    assert diversity(draw, PROMPTS[1:4]) == pytest.approx(4 / 6 / 255)


def test_subsamples_are_spread():
    assert list(subsample(range(100), 3)) == [0, 33, 66]
    assert list(subsample(range(2), 3)) == [0, 1]


def test_seeds_and_batches():
    asked = []

    def generate(texts, seeds):
        asked.append(list(zip(texts, seeds, strict=True)))
        return np.zeros((len(texts), 64, 64, 3), np.uint8)

    evaluate_alignment(generate, GreyJudge(), PROMPTS[:5], seed=100, batch_size=3)
    first = [pair for part in asked[:2] for pair in part]
    assert first == [(prompt.text, 100 + i) for i, prompt in enumerate(PROMPTS[:5])]
    assert all(len(part) <= 3 for part in asked)


class Model:
    """Draws as told, in batches of three."""

    defaults = types.SimpleNamespace(height=8, width=8)

    def __call__(self, texts, *, seed, batch_size, output, steps):
        assert (batch_size, output, steps) == (3, "numpy", 4)
        return types.SimpleNamespace(images=draw(texts, seed))


def test_a_model_is_called_with_its_options():
    model = Model()
    generate = model_generator(model, GreyJudge(), batch_size=3, steps=4)
    found = evaluate_alignment(generate, GreyJudge(), PROMPTS, batch_size=3)
    assert found.accuracies["level"].value == 13 / 25
    model.defaults = types.SimpleNamespace(height=8, width=9)
    with pytest.raises(InputError, match="got no square"):
        model_generator(model, GreyJudge())


def test_wrong_images_are_refused():
    with pytest.raises(InputError, match="generated images"):
        evaluate_alignment(lambda *_: np.zeros((1, 32, 16, 3), np.uint8), GreyJudge(), PROMPTS[:1])
