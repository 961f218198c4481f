"""Scenes and prompts as labels for a classifier: which object is in which place.

Objects are distinguished by their place in the arrangement: the first is the only one, the left or
the upper one. So a colour belongs to a shape, and the relation follows from which object is first.
Held-out pairs of colour and shape have labels too, since each place has a group for each attribute.
The groups without a place serve prompts whose places the grammar does not understand.
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

ONE, *AXES = LAYOUTS = ("one", "left of", "above")  # two objects: where the first is
PLACES = ("first", "second")
ATTRIBUTE_VALUES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}

ATTRIBUTES = LabelSet(
    (
        LabelGroup(name="background", labels=BACKGROUNDS),
        LabelGroup(name="layout", labels=LAYOUTS),
        *(
            LabelGroup(name=f"{place}_{kind}", labels=labels)
            for place in PLACES
            for kind, labels in ATTRIBUTE_VALUES.items()
        ),
        *(
            LabelGroup(name=f"{kind}s", labels=labels, exclusive=False)
            for kind, labels in ATTRIBUTE_VALUES.items()
        ),
    )
)

# The attributes that heads predict from the last hidden states of a text encoder, one tuple for
# each state: the whole scene, then each place.
SLOTS = (
    ("background", "layout"),
    *(tuple(f"{p}_{kind}" for kind in ATTRIBUTE_VALUES) for p in PLACES),
)

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
    kinds=tuple(ATTRIBUTE_VALUES),
)


def scene_attributes(scene: Scene) -> LabelTargets:
    """The labels of a scene; unspecified attributes are unknown."""
    objects, axis = arrangement(scene)
    looks = [{kind: getattr(obj, kind) for kind in ATTRIBUTE_VALUES} for obj in objects]
    anywhere = {
        f"{kind}s": [look[kind] for look in looks]
        for kind in ATTRIBUTE_VALUES
        if all(look[kind] is not None for look in looks)
    }
    labels = GRAMMAR.in_places(axis or ONE, looks) | {"background": scene.background}
    targets = label_targets(ATTRIBUTES, labels, anywhere)
    for name in anywhere:  # absent labels are known too
        targets.known[ATTRIBUTES.slices[name]] = True
    return targets


def text_attributes(text: str) -> LabelTargets:
    """The labels that a prompt asks for; see `PromptGrammar.labels_of`."""
    return GRAMMAR.labels_of(text, ATTRIBUTES)


def collate_captioned(items: Sequence[Item], tokenizer: Any) -> Batch:
    """A batch of images and token ids with the labels of both, for CLIP's attribute heads.

    Besides the entries of `collate_attributes`, it has "ids", and "text_targets" and "text_known"
    of the captions, which omit some attributes.
    """
    targets = [text_attributes(item["caption"]) for item in items]
    return (
        collate_attributes(items)
        | collate([{"caption": item["caption"]} for item in items], tokenizer)
        | {
            "text_targets": np.stack([each.targets for each in targets]),
            "text_known": np.stack([each.known for each in targets]),
        }
    )


def collate_attributes(items: Sequence[Item]) -> Batch:
    """Items with "image" and "scene" as "image" (b, h, w, 3), "targets" and "known" (b, n)."""
    targets = [scene_attributes(item["scene"]) for item in items]
    return collate(items) | {
        "targets": np.stack([each.targets for each in targets]),
        "known": np.stack([each.known for each in targets]),
    }
