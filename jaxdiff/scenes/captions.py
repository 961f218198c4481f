"""Scenes in words, from a closed vocabulary: "a large blue star above a green square"."""

from dataclasses import replace

import numpy as np

from jaxdiff.scenes.specification import Scene, SceneObject

SIZE_PROBABILITY = 0.7  # that a caption mentions the size of an object
BACKGROUND_PROBABILITY = 0.6


def _noun_phrase(obj: SceneObject) -> str:
    words = " ".join(word for word in (obj.size, obj.colour, obj.shape) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(scene: Scene) -> str:
    """The caption that mentions everything that `scene` specifies."""
    words = f" {scene.relation} ".join(_noun_phrase(obj) for obj in scene.objects)
    return f"{words} on a {scene.background} background" if scene.background else words


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
