"""Scenes in words, from a closed vocabulary: "a large blue star above a green square"."""

import re
from dataclasses import replace

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.scenes.specification import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
)

SIZE_PROBABILITY = 0.7  # that a caption mentions the size of an object
BACKGROUND_PROBABILITY = 0.6


def _noun_phrase(obj: SceneObject) -> str:
    words = " ".join(word for word in (obj.size, obj.colour, obj.shape) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(scene: Scene) -> str:
    """The caption that mentions everything that `scene` specifies."""
    words = f" {scene.relation} ".join(_noun_phrase(obj) for obj in scene.objects)
    return f"{words} on a {scene.background} background" if scene.background else words


_PHRASE = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{_PHRASE}(?: ({'|'.join(RELATIONS)}) {_PHRASE})?"
    rf"(?: on a ({'|'.join(BACKGROUNDS)}) background)?"
)


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes: the inverse of `describe`. InputError for other texts."""
    found = _CAPTION.fullmatch(caption.strip().lower())
    if found is None:
        example = "'a small red circle above a large blue square on a white background'"
        raise InputError(
            f"prompt: got {caption!r}, expected a caption of a scene, such as {example}"
        )
    *words, background = found.groups()
    size, colour, shape, relation, *second = words
    looks = [(size, colour, shape)] + ([tuple(second)] if relation else [])
    objects = tuple(SceneObject(size=s, colour=c, shape=form) for s, c, form in looks)
    return Scene(objects=objects, relation=relation, background=background)


def underspecify(scene: Scene, rng: np.random.Generator, *others: Scene) -> Scene:
    """`scene` with random sizes and background unspecified, so that its caption omits them.

    What distinguishes it from `others` (with as many objects) stays. With the same random numbers,
    each of them omits the same attributes, so that all their captions differ.
    """
    chances = rng.random(3)
    variations = (scene, *others)
    objects = tuple(
        obj
        if chance < SIZE_PROBABILITY or len({other.objects[i].size for other in variations}) > 1
        else replace(obj, size=None)
        for i, (obj, chance) in enumerate(zip(scene.objects, chances, strict=False))
    )
    keep_background = (
        chances[2] < BACKGROUND_PROBABILITY or len({other.background for other in variations}) > 1
    )
    return replace(scene, objects=objects, background=scene.background if keep_background else None)
