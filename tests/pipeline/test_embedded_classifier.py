"""The embedded classifier: it tells scenes that it was not trained on, and who is where in them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.checkpoints.components import read_component
from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.pipelines import CLASSIFIER
from jaxdiff.checkpoints.schedulers import vp_schedule
from jaxdiff.models.build import param_dict
from jaxdiff.scenes.captions import describe
from jaxdiff.scenes.labels import ATTRIBUTES, collate_attributes, text_attributes
from jaxdiff.scenes.source import SceneSource
from jaxdiff.training.objectives.classifier import accuracies, add_schedule_noise

COUNT = 128
SIDE = 128  # of the images, in pixels
LEVELS = (0, 500, 950)
# Fractions of 1024 validation scenes at timesteps 0 and 500, by benchmarks/classifier.py.
MEASURED = {
    "background": (1.000, 0.998),
    "layout": (0.999, 0.996),
    "first_size": (1.000, 0.995),
    "first_colour": (0.999, 0.931),
    "first_shape": (0.991, 0.886),
    "second_size": (1.000, 0.996),
    "second_colour": (0.999, 0.927),
    "second_shape": (0.988, 0.877),
}
SCHEDULE = vp_schedule(read_object(EMBEDDED / "scheduler/scheduler_config.json"))


class Seen(NamedTuple):
    """Latents of validation scenes, what they show, and the classifier."""

    model: object
    scenes: list
    x0: jax.Array
    targets: jax.Array
    known: jax.Array


@pytest.fixture(scope="module")
def seen():
    model = read_component(EMBEDDED / CLASSIFIER, dtype=jnp.float32).module
    vae = read_component(EMBEDDED / "vae", dtype=jnp.float32).module
    source = SceneSource(seed=7, split="validation", size=SIDE)
    batch = collate_attributes([source[i] for i in range(COUNT)])
    x0 = jax.jit(lambda image: vae.scale(vae.encode(image)[0]))(jnp.asarray(batch["image"]))
    scenes = [source.example(i)[0] for i in range(COUNT)]
    return Seen(model, scenes, x0, jnp.asarray(batch["targets"]), jnp.asarray(batch["known"]))


def asked(texts):
    """Targets and masks of prompts."""
    known = [text_attributes(text) for text in texts]
    return tuple(jnp.asarray(np.stack(masks)) for masks in zip(*known, strict=True))


def test_it_is_small_and_half_precision():
    module = read_component(EMBEDDED / CLASSIFIER).module
    assert {str(array.dtype) for array in param_dict(module).values()} == {"float16"}
    assert sum(path.stat().st_size for path in (EMBEDDED / CLASSIFIER).iterdir()) <= 3e6
    assert module.config.attributes == ATTRIBUTES


def test_it_tells_scenes_that_it_was_not_trained_on(seen):
    """At time 0 and in the middle, within three standard errors of what was MEASURED."""
    shares = jax.jit(accuracies, static_argnums=(1, 5))(
        seen.model, SCHEDULE, seen.x0, seen.targets, seen.known, LEVELS, jax.random.key(0)
    )
    table = {
        name: np.asarray(column) for name, column in zip(ATTRIBUTES.slices, shares.T, strict=True)
    }
    for name, measured in MEASURED.items():
        n = int(seen.known[:, ATTRIBUTES.slices[name].start].sum())
        for got, share in zip(table[name], measured, strict=False):
            assert got >= share - 3 * np.sqrt(max(share * (1 - share), 1 / n) / n), name
    # noise hides what is there, but not yet everything
    assert table["first_colour"][2] < 0.6 < table["first_colour"][1]
    assert table["background"][2] > 1 / 3 + 3 * np.sqrt(2 / 9 / COUNT)


def test_it_tells_whose_colour_it_is_and_who_is_where(seen):
    """The right prompt is likelier than the one with two colours, or both things, exchanged."""
    flipped = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    pairs = [i for i, scene in enumerate(seen.scenes) if len(scene.objects) == 2]
    pairs = [i for i in pairs if len({t.colour for t in seen.scenes[i].objects}) == 2]
    right, recoloured, moved = [], [], []
    for scene in (seen.scenes[i] for i in pairs):
        one, two = scene.objects
        colours = (
            dataclasses.replace(one, colour=two.colour),
            dataclasses.replace(two, colour=one.colour),
        )
        text = describe(scene)
        right.append(text)
        words = [f"{t.size} {t.colour} {t.shape}" for t in colours]
        recoloured.append(f"a {words[0]} {scene.relation} a {words[1]}")
        moved.append(text.replace(scene.relation, flipped[scene.relation]))
    at = jnp.asarray(pairs)
    t = jnp.full(len(pairs), 300)
    x = add_schedule_noise(SCHEDULE, seen.x0[at], t, jax.random.key(1))
    logits = jax.jit(lambda x, t: seen.model(x, t))(x, t)
    right, recoloured, moved = (
        np.asarray(ATTRIBUTES.log_prob(logits, *asked(texts)))
        for texts in (right, recoloured, moved)
    )
    assert np.mean(right > recoloured) > 0.9
    assert np.mean(right > moved) > 0.9


@pytest.mark.parametrize("level", [0, 500, 999])
def test_the_gradient_leads_to_what_is_asked_for(seen, level):
    n = 16
    targets, known = asked(["a small red circle above a large blue square"] * n)
    t = jnp.full(n, level)
    x = add_schedule_noise(SCHEDULE, seen.x0[:n], t, jax.random.key(2))

    @jax.jit
    def value(x):
        return ATTRIBUTES.log_prob(seen.model(x, t), targets, known)

    gradient = jax.grad(lambda x: value(x).sum())(x)
    assert np.isfinite(gradient).all()
    norm = jnp.sqrt(jnp.sum(gradient**2, axis=(1, 2, 3), keepdims=True))
    assert (norm > 1e-3).all()
    assert (value(x + 0.1 * gradient / norm) > value(x)).all()
