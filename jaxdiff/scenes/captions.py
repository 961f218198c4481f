"""Scenes in words, from a closed vocabulary: "a large blue star above a green square"."""

from dataclasses import replace

import numpy as np

from jaxdiff.scenes.specification import Scene, Thing

SAY_SIZE = 0.7  # probability that a thing's size is said
SAY_BACKGROUND = 0.6


def _noun_phrase(thing: Thing) -> str:
    words = " ".join(word for word in (thing.size, thing.colour, thing.shape) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(scene: Scene) -> str:
    """The caption that says all that `scene` specifies; what is open stays unsaid."""
    words = f" {scene.relation} ".join(_noun_phrase(thing) for thing in scene.things)
    return f"{words} on a {scene.background} background" if scene.background else words


def leave_open(scene: Scene, rng: np.random.Generator, *others: Scene) -> Scene:
    """`scene` with sizes and background left open at random, as captions leave them unsaid.

    What sets it apart from `others` (of as many things) stays; with the same draws each of them
    leaves the same open, so that all their captions differ.
    """
    chances = rng.random(3)
    block = (scene, *others)
    things = tuple(
        thing
        if chance < SAY_SIZE or len({other.things[i].size for other in block}) > 1
        else replace(thing, size=None)
        for i, (thing, chance) in enumerate(zip(scene.things, chances, strict=False))
    )
    said = chances[2] < SAY_BACKGROUND or len({other.background for other in block}) > 1
    return replace(scene, things=things, background=scene.background if said else None)
