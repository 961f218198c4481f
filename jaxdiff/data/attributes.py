"""Scenes and prompts as attributes that a classifier can tell: what is there, and in which place.

Things are told by their place in the arrangement, the first being the only one, the left or the
upper one: so a colour belongs to a shape, and a relation is who is first. Held-out pairs of colour
and shape are told too, for every place has a group for each. Which colours, shapes and sizes there
are anywhere is for prompts whose places are not understood.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Bool, NDArray
from jaxdiff.data.batches import Batch, Item, collate
from jaxdiff.data.specification import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    arrangement,
)
from jaxdiff.models.attributes import LabelGroup, LabelSet

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

_BACKGROUND = re.compile(
    rf"\bon an? ([a-z]+) background\b|(?:\ba )?\b({'|'.join(BACKGROUNDS)}) background\b"
)
_RELATION = re.compile(rf"\b({'|'.join(RELATIONS)})\b")
_MIRRORED = {"right of": "left of", "below": "above"}


class Known(NamedTuple):
    """Masks over the labels of ATTRIBUTES: which are right, and of which that is known."""

    targets: Bool[NDArray, "n"]
    known: Bool[NDArray, "n"]


@dataclass(frozen=True, kw_only=True)
class _Phrase:
    """The words of a prompt that concern one thing, or of which that is not sure."""

    said: Mapping[str, tuple[str, ...]]  # sizes, colours and shapes
    articles: int
    foreign: int  # words of another language than the captions'

    @classmethod
    def of(cls, text: str) -> "_Phrase":
        words = text.split()
        said = {kind: tuple(w for w in words if w in labels) for kind, labels in WORDS.items()}
        articles = sum(word in ("a", "an") for word in words)
        foreign = len(words) - articles - sum(len(found) for found in said.values())
        return cls(said=said, articles=articles, foreign=foreign)

    @property
    def single(self) -> bool:
        """Whether nothing speaks for several things."""
        return self.articles <= 1 and all(len(words) <= 1 for words in self.said.values())

    def thing(self) -> dict[str, str | None]:
        """Size, colour and shape of a single thing."""
        return {kind: words[0] if words else None for kind, words in self.said.items()}


def scene_attributes(scene: Scene) -> Known:
    """The attributes of a scene: all of them, but for what it leaves open."""
    things, axis = arrangement(scene)
    looks = [{kind: getattr(thing, kind) for kind in WORDS} for thing in things]
    anywhere = {
        f"{kind}s": [look[kind] for look in looks]
        for kind in WORDS
        if all(look[kind] is not None for look in looks)
    }
    answers = _in_places(axis or ONE, looks) | {"background": scene.background}
    known = _masks(answers, anywhere)
    for name in anywhere:  # what is not there is known as well
        known.known[ATTRIBUTES.slices[name]] = True
    return known


def text_attributes(text: str) -> Known:
    """The attributes that a prompt asks for; captions of scenes are understood completely.

    Each is told once: in its place ("a red circle above a blue square"), or as being there at all
    where the places are not understood ("red and blue"). Other words than those of captions leave
    unknown what they stand for: the shape in "a red dog above a star", the background in "on a
    dark background". InputError if nothing is known.
    """
    words = " ".join(re.findall("[a-z]+", text.lower()))
    backgrounds = {a or b for a, b in _BACKGROUND.findall(words)} & {*BACKGROUNDS}
    answers: dict[str, str | None] = {}
    if len(backgrounds) == 1:
        answers["background"] = backgrounds.pop()
    first, *rest = _RELATION.split(_BACKGROUND.sub(" ", words))
    phrases = [_Phrase.of(part) for part in (first, *rest[1::2])]
    relations = rest[::2]
    anywhere: dict[str, list[str]] = {}
    looks = [phrase.thing() for phrase in phrases]
    singles = all(phrase.single for phrase in phrases)
    if len(relations) == 1 and singles:
        axis = _MIRRORED.get(relations[0], relations[0])
        answers |= _in_places(axis, looks if axis == relations[0] else looks[::-1])
    elif not relations and singles and not phrases[0].foreign and any(looks[0].values()):
        answers |= _in_places(ONE, looks)
    else:
        for kind in WORDS:
            anywhere[f"{kind}s"] = [word for phrase in phrases for word in phrase.said[kind]]
    result = _masks(answers, anywhere)
    if not result.known.any():
        raise InputError(
            f"prompt: got {text!r:.80}, expected words of scenes: "
            f"{', '.join((*COLOURS[:2], *SHAPES[:2], *SIZES))}, ..."
        )
    return result


def _in_places(layout: str, looks: Sequence[Mapping[str, str | None]]) -> dict[str, str | None]:
    """Answers of the layout and of the places."""
    answers: dict[str, str | None] = {"layout": layout}
    for place, look in zip(PLACES, looks, strict=False):
        answers |= {f"{place}_{kind}": word for kind, word in look.items()}
    return answers


def _masks(
    answers: Mapping[str, str | None], anywhere: Mapping[str, Iterable[str | None]]
) -> Known:
    """The right answers of exclusive groups (None: not known), and labels that are there."""
    result = Known(np.zeros(ATTRIBUTES.width, bool), np.zeros(ATTRIBUTES.width, bool))
    for name, label in answers.items():
        if label is not None:
            result.targets[ATTRIBUTES.index(name, label)] = True
            result.known[ATTRIBUTES.slices[name]] = True
    for name, labels in anywhere.items():
        for label in labels:
            if label is not None:
                at = ATTRIBUTES.index(name, label)
                result.targets[at] = result.known[at] = True
    return result


def collate_attributes(items: Sequence[Item]) -> Batch:
    """Items with "image" and "scene" as "image" (b, h, w, 3), "targets" and "known" (b, n)."""
    known = [scene_attributes(item["scene"]) for item in items]
    return collate(items) | {
        "targets": np.stack([each.targets for each in known]),
        "known": np.stack([each.known for each in known]),
    }
