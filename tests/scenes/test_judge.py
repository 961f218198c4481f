"""The judge of scenes: what is drawn as asked is correct, and nothing else."""

import numpy as np

from jaxdiff.evaluation.alignment import evaluate_alignment
from jaxdiff.scenes import judge
from jaxdiff.scenes.judge import (
    NUM_CIRCLES,
    NUM_PROMPTS,
    probe_measures,
    probe_prompts,
    render_generator,
    standard_prompts,
)
from jaxdiff.scenes.source import KINDS, sample_prompts
from jaxdiff.scenes.specification import is_held_out_pair

MIXED = [prompt for kind in KINDS for prompt in sample_prompts(6, 0, kind)]


def test_drawings_of_the_prompts_are_all_correct():
    perfect = evaluate_alignment(render_generator(MIXED), judge, MIXED, batch_size=7)
    assert {name: each.value for name, each in perfect.accuracies.items()} == dict.fromkeys(
        perfect.accuracies, 1.0
    )
    counts = {name: each.count for name, each in perfect.accuracies.items()}
    assert counts["number"] == 12
    assert counts["colour"] == counts["shape"] == 18
    assert counts["relation"] == counts["two objects correct"] == counts["one object correct"] == 6
    assert counts["held-out correct"] == 12
    assert counts["background"] == sum(p.scene.background is not None for p in MIXED[:12])


def test_images_of_other_prompts_are_mostly_wrong():
    drawn = render_generator(MIXED)
    others = {a.text: b.text for a, b in zip(MIXED, MIXED[1:] + MIXED[:1], strict=True)}
    report = evaluate_alignment(
        lambda texts, seeds: drawn([others[t] for t in texts], seeds), judge, MIXED
    )
    assert report.accuracies["two objects correct"].value < 0.2
    assert report.accuracies["held-out correct"].value < 0.2


def test_standard_prompts():
    prompts = standard_prompts()
    assert len(prompts) == sum(NUM_PROMPTS.values()) == 640
    new = [any(is_held_out_pair(t.colour, t.shape) for t in p.scene.objects) for p in prompts]
    assert sum(new) == 128


def test_circles_are_measured():
    """A square of side 2 deviates by the mean of |r - mean r| / mean r along its outline."""
    prompts = probe_prompts()
    assert len(prompts) == NUM_CIRCLES
    assert probe_prompts(16) == prompts[:7]
    circles = render_generator([])([prompt.text for prompt in prompts[:7]], list(range(7)))
    assert probe_measures(circles)["circle deviation"] < 0.01
    (text,) = {"a large red square on a white background"}
    square = render_generator([judge.parse_prompt(text)])([text], [0])
    angles = np.linspace(-np.pi / 4, np.pi / 4, 100_001)
    radius = 1 / np.cos(angles)
    expected = np.mean(np.abs(radius - radius.mean())) / radius.mean()
    assert abs(probe_measures(square)["circle deviation"] - expected) < 0.01
    assert np.isnan(probe_measures(np.zeros((1, 64, 64, 3), np.uint8))["circle deviation"])
