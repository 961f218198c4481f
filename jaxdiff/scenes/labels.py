"""Scenes and prompts as attributes that a classifier can tell: what is there, and in which place.

Things are told by their place in the arrangement, the first being the only one, the left or the
upper one: so a colour belongs to a shape, and a relation is who is first. Held-out pairs of colour
and shape are told too, for every place has a group for each. Which colours, shapes and sizes there
are anywhere is for prompts whose places are not understood.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.data.batches import Batch, Item, collate
from jaxdiff.models.attributes import LabelGroup, LabelSet
from jaxdiff.models.prompt_labels import LabelTargets, PromptGrammar, label_targets
from jaxdiff.scenes.specification import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    arrangement,
)

ONE, *AXES = LAYOUTS = ("one", "left of", "above")  # two things: where the first is
PLACES = ("first", "second")
WORDS = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}

ATTRIBUTES = LabelSet(
    (
        LabelGroup(name="background", labels=BACKGROUNDS),
        LabelGroup(name="layout", labels=LAYOUTS),
        *(
            LabelGroup(name=f"{place}_{kind}", labels=labels)
            for place in PLACES
            for kind, labels in WORDS.items()
        ),
        *(
            LabelGroup(name=f"{kind}s", labels=labels, exclusive=False)
            for kind, labels in WORDS.items()
        ),
    )
)

# What the last states of a text encoder can be asked for, one group of names for each of them: the
# whole scene, then each place.
SLOTS = (("background", "layout"), *(tuple(f"{p}_{kind}" for kind in WORDS) for p in PLACES))

# How captions of scenes name the labels.
GRAMMAR = PromptGrammar(
    background="background",
    layout="layout",
    single=ONE,
    relations=(
        ("left of", "left of", "first"),
        ("right of", "left of", "second"),
        ("above", "above", "first"),
        ("below", "above", "second"),
    ),
    places=PLACES,
    kinds=tuple(WORDS),
)


def scene_attributes(scene: Scene) -> LabelTargets:
    """The attributes of a scene: all of them, but for what it leaves open."""
    things, axis = arrangement(scene)
    looks = [{kind: getattr(thing, kind) for kind in WORDS} for thing in things]
    anywhere = {
        f"{kind}s": [look[kind] for look in looks]
        for kind in WORDS
        if all(look[kind] is not None for look in looks)
    }
    answers = GRAMMAR.in_places(axis or ONE, looks) | {"background": scene.background}
    known = label_targets(ATTRIBUTES, answers, anywhere)
    for name in anywhere:  # what is not there is known as well
        known.known[ATTRIBUTES.slices[name]] = True
    return known


def text_attributes(text: str) -> LabelTargets:
    """The attributes that a prompt asks for; see `PromptGrammar.labels_of`."""
    return GRAMMAR.labels_of(text, ATTRIBUTES)


def collate_captioned(items: Sequence[Item], tokenizer: Any) -> Batch:
    """A batch of images and ids with the attributes of both: what CLIP's attribute heads learn.

    Beside what `collate_attributes` gives there are "ids", and "text_targets" and "text_known" of
    the captions, which leave some attributes open.
    """
    read = [text_attributes(item["caption"]) for item in items]
    return (
        collate_attributes(items)
        | collate([{"caption": item["caption"]} for item in items], tokenizer)
        | {
            "text_targets": np.stack([each.targets for each in read]),
            "text_known": np.stack([each.known for each in read]),
        }
    )


def collate_attributes(items: Sequence[Item]) -> Batch:
    """Items with "image" and "scene" as "image" (b, h, w, 3), "targets" and "known" (b, n)."""
    known = [scene_attributes(item["scene"]) for item in items]
    return collate(items) | {
        "targets": np.stack([each.targets for each in known]),
        "known": np.stack([each.known for each in known]),
    }
