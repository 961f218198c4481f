"""The judge of scenes: its prompts, and what is correct in their images."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray, UInt8
from jaxdiff.scenes.captions import describe, parse_caption
from jaxdiff.scenes.detector import Score, circle_deviation, detect, score
from jaxdiff.scenes.rendering import CANVAS, NUM_LAYOUT_UNIFORMS, layout_objects, render
from jaxdiff.scenes.source import MAX_SIZE, ScenePrompt, sample_prompts
from jaxdiff.scenes.specification import (
    BACKGROUNDS,
    COLOURS,
    SIZES,
    Scene,
    SceneObject,
    is_held_out_pair,
)

NUM_PROMPTS = {"one": 179, "two": 333, "heldout-one": 64, "heldout-two": 64}
NUM_CIRCLES = 100  # more than the number of different ones


def standard_prompts(seed: int = 0) -> list[ScenePrompt]:
    """The prompts that compare models: 512 of the validation split, 128 with held-out pairs.

    Of the 512, 35% have one object, as in the data set; see `sample_prompts`.
    """
    return [prompt for kind, n in NUM_PROMPTS.items() for prompt in sample_prompts(n, seed, kind)]


def parse_prompt(text: str) -> ScenePrompt:
    """The caption `text` and its scene; InputError for a text that is no caption of a scene."""
    return ScenePrompt(text=text, scene=parse_caption(text))


def score_images(prompts: Sequence[ScenePrompt], images: UInt8[NDArray, "n h w 3"]) -> list[Score]:
    """The score of each image against its prompt."""
    return [score(p.scene, detect(image)) for p, image in zip(prompts, images, strict=True)]


def answers(prompts: Sequence[ScenePrompt], scores: Sequence[Score]) -> dict[str, list[bool]]:
    """What is correct, by name; attributes only for prompts without a held-out pair.

    Colour, shape and size count objects; background, number and relation count images. What a
    prompt does not specify is not counted. "... correct" counts images in which everything is
    correct.
    """
    held_out = [
        any(is_held_out_pair(t.colour, t.shape) for t in prompt.scene.objects) for prompt in prompts
    ]
    trained = [s for s, new in zip(scores, held_out, strict=True) if not new]

    def all_correct(new: bool, *numbers: int) -> list[bool]:
        rows = zip(prompts, scores, held_out, strict=True)
        return [
            s.all_correct for p, s, test in rows if test is new and len(p.scene.objects) in numbers
        ]

    return {
        "background": _known(s.background for s in trained),
        "number": _known(s.count for s in trained),
        "colour": _known(correct for s in trained for correct in s.colours),
        "shape": _known(correct for s in trained for correct in s.shapes),
        "size": _known(correct for s in trained for correct in s.sizes),
        "relation": _known(s.relation for s in trained),
        "one object correct": all_correct(False, 1),
        "two objects correct": all_correct(False, 2),
        "held-out one object correct": all_correct(True, 1),
        "held-out two objects correct": all_correct(True, 2),
        "held-out correct": all_correct(True, 1, 2),
    }


def _known(answers: Iterable[bool | None]) -> list[bool]:
    return [answer for answer in answers if answer is not None]


def probe_prompts(stride: int = 1) -> list[ScenePrompt]:
    """Prompts with one circle each, NUM_CIRCLES / stride of them.

    Colours, sizes and backgrounds alternate.
    """
    looks = itertools.cycle(itertools.product(BACKGROUNDS, SIZES, COLOURS))
    scenes = [
        Scene(
            objects=(SceneObject(colour=colour, shape="circle", size=size),), background=background
        )
        for background, size, colour in itertools.islice(looks, -(-NUM_CIRCLES // stride))
    ]
    return [ScenePrompt(text=describe(scene), scene=scene) for scene in scenes]


def probe_measures(images: UInt8[NDArray, "n h w 3"]) -> Mapping[str, float]:
    """The mean `circle_deviation` of images of circles; NaN if none shows one object."""
    found = [deviation for image in images if (deviation := circle_deviation(image)) is not None]
    return {"circle deviation": float(np.mean(found)) if found else math.nan}


def _fill_in(scene: Scene, rng: np.random.Generator) -> Scene:
    """`scene` with random values for what it does not specify."""
    objects = tuple(
        dataclasses.replace(obj, size=obj.size or SIZES[rng.integers(len(SIZES))])
        for obj in scene.objects
    )
    background = scene.background or BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return dataclasses.replace(scene, objects=objects, background=background)


def render_generator(
    prompts: Sequence[ScenePrompt], size: int | None = None
) -> Callable[[list[str], list[int]], np.ndarray]:
    """The function (prompts, seeds) -> images that renders these prompts exactly.

    It is an upper bound for any model. It knows all `probe_prompts` too. Its images are `size`
    pixels wide, by default CANVAS.
    """
    scenes = {prompt.text: prompt.scene for prompt in (*probe_prompts(), *prompts)}

    def generate(texts: list[str], seeds: list[int]) -> UInt8[NDArray, "n h w 3"]:
        images = []
        for text, seed in zip(texts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            scene = _fill_in(scenes[text], rng)
            images.append(
                render(
                    scene, layout_objects(scene, rng.random(NUM_LAYOUT_UNIFORMS)), size or CANVAS
                )
            )
        return np.stack(images)

    return generate


def check_model_size(height: int, width: int) -> None:
    """InputError unless these are the height and width of squares of a size that scenes have."""
    if height != width or not CANVAS <= height <= MAX_SIZE:
        raise InputError(
            f"model: got a default size of {height} x {width}, expected a scene model: squares of "
            f"{CANVAS} to {MAX_SIZE} pixels"
        )
