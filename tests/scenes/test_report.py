"""The report: perfect for drawings of the prompts, poor without them, and plain in its measures."""

import json

import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.scenes.report import (
    NUM_PROMPTS,
    Accuracy,
    chroma,
    clipped_fraction,
    contrast,
    diversity,
    evaluate_alignment,
    pairwise_distance,
    render_generator,
    standard_prompts,
)
from jaxdiff.scenes.source import KINDS, is_held_out_pair, sample_prompts

MIXED = [prompt for kind in KINDS for prompt in sample_prompts(6, 0, kind)]


@pytest.fixture(scope="module")
def perfect():
    return evaluate_alignment(render_generator(MIXED), MIXED, batch_size=7)


def test_drawings_of_the_prompts_are_all_correct(perfect):
    assert {name: each.value for name, each in perfect.accuracies.items()} == dict.fromkeys(
        perfect.accuracies, 1.0
    )
    counts = {name: each.count for name, each in perfect.accuracies.items()}
    assert counts["number"] == 12
    assert counts["colour"] == counts["shape"] == 18
    assert counts["relation"] == counts["two objects correct"] == counts["one object correct"] == 6
    assert counts["held-out correct"] == 12
    assert counts["background"] == sum(p.scene.background is not None for p in MIXED[:12])


def test_pictures_of_other_prompts_are_mostly_wrong():
    drawn = render_generator(MIXED)
    others = {a.text: b.text for a, b in zip(MIXED, MIXED[1:] + MIXED[:1], strict=True)}
    report = evaluate_alignment(
        lambda texts, seeds: drawn([others[t] for t in texts], seeds), MIXED
    )
    assert report.accuracies["two objects correct"].value < 0.2
    assert report.accuracies["held-out correct"].value < 0.2


def test_the_report_is_json_and_a_table(perfect):
    mapping = json.loads(json.dumps(perfect.to_mapping()))
    assert mapping["accuracies"]["colour"] == {"value": 1.0, "count": 18}
    assert set(mapping["measures"]) == {"diversity", "chroma", "clipped", "contrast"}
    lines = perfect.table().splitlines()
    assert len(lines) == len(perfect.accuracies) + 4
    assert lines[0].startswith("background")


def test_the_error_is_binomial():
    assert Accuracy(value=0.5, count=100).error == pytest.approx(0.05)


def test_measures_by_hand():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[0, :32] = (255, 100, 100)
    assert clipped_fraction(image) == pytest.approx((1 + 1 / 3) / 2)
    assert chroma(image) == pytest.approx(155 / 255 / 2)
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    assert pairwise_distance(np.stack([black, white])) == 1
    half = np.concatenate([black[:32], white[:32]])
    assert contrast(np.stack([half, white])) == pytest.approx((0.5 + 0) / 2)
    green = half * np.array([0, 1, 0], np.uint8)
    assert contrast(green[None]) == pytest.approx(0.7152 / 2)
    assert pairwise_distance(np.stack([black, black, white])) == pytest.approx(2 / 3)


def test_diversity_is_zero_without_any():
    def same(texts, seeds):
        return np.zeros((len(texts), 64, 64, 3), np.uint8)

    assert diversity(same, MIXED[:3]) == 0
    assert diversity(render_generator(MIXED), MIXED[:3]) > 0.05


def test_seeds_and_batches():
    asked = []

    def generate(texts, seeds):
        asked.append(list(zip(texts, seeds, strict=True)))
        return np.zeros((len(texts), 64, 64, 3), np.uint8)

    evaluate_alignment(generate, MIXED[:5], seed=100, batch_size=3)
    first = [pair for part in asked[:2] for pair in part]
    assert first == [(prompt.text, 100 + i) for i, prompt in enumerate(MIXED[:5])]
    assert all(len(part) <= 3 for part in asked)


def test_wrong_pictures_are_refused():
    with pytest.raises(InputError, match="generated images"):
        evaluate_alignment(lambda texts, seeds: np.zeros((1, 32, 32, 3), np.uint8), MIXED[:1])


def test_standard_prompts():
    prompts = standard_prompts()
    assert len(prompts) == sum(NUM_PROMPTS.values()) == 640
    new = [any(is_held_out_pair(t.colour, t.shape) for t in p.scene.objects) for p in prompts]
    assert sum(new) == 128
