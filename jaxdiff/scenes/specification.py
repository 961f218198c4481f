"""What a scene says: things, their relation and the background; and which scenes are trained on."""

import hashlib
from dataclasses import dataclass

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("white", "grey", "pink")
SPLITS = ("train", "validation", "heldout")

# Never trained on, in any size, position or company: what composition is measured on.
HELD_OUT = frozenset(
    {("purple", "star"), ("green", "ring"), ("orange", "cross"), ("blue", "triangle")}
)

# One in this many arrangements of two things is kept for validation.
RESERVED_ARRANGEMENTS = 10


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object; a size of None is left open."""

    colour: str
    shape: str
    size: str | None = None

    def __post_init__(self) -> None:
        one_of("colour", self.colour, COLOURS)
        one_of("shape", self.shape, SHAPES)
        one_of("size", self.size, (*SIZES, None))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two things; `relation` is where the first is, seen from the second.

    A background of None is left open. Raises InputError for a relation without two things, two
    things without a relation, or two things that look the same (the relation would be void).
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        one_of("number of things", len(self.things), (1, 2))
        one_of("relation", self.relation, RELATIONS if len(self.things) == 2 else (None,))
        one_of("background", self.background, (*BACKGROUNDS, None))
        looks = {(thing.colour, thing.shape) for thing in self.things}
        if len(looks) < len(self.things):
            raise InputError(f"things: got {looks} twice, expected two that look different")


def held_out(colour: str, shape: str) -> bool:
    """Whether this colour of this shape never occurs in training."""
    return (colour, shape) in HELD_OUT


def arrangement(scene: Scene) -> tuple[tuple[Thing, ...], str | None]:
    """Things ordered left to right or top to bottom, and "left of", "above" or None.

    "A right of B" and "B left of A" are one picture and have one arrangement.
    """
    if scene.relation in ("right of", "below"):
        mirrored = {"right of": "left of", "below": "above"}[scene.relation]
        return scene.things[::-1], mirrored
    return scene.things, scene.relation


def _hash(words: str, buckets: int) -> int:
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % buckets


def reserved(scene: Scene) -> bool:
    """Whether a scene is kept for validation: the same answer for every seed and machine.

    Two things: one in RESERVED_ARRANGEMENTS of (colour and shape of both, order, axis), whatever
    the sizes and the background, so that no wording of such a scene occurs in training. One
    thing: for each colour and shape one of its six (size, background); these must be given.
    """
    things, axis = arrangement(scene)
    if axis is not None:
        words = " ".join(f"{thing.colour} {thing.shape}" for thing in things)
        return _hash(f"{words} {axis}", RESERVED_ARRANGEMENTS) == 0
    (thing,) = things
    if thing.size is None or scene.background is None:
        raise InputError("scene: got one thing with an open size or background, expected both")
    place = SIZES.index(thing.size) * len(BACKGROUNDS) + BACKGROUNDS.index(scene.background)
    choices = len(SIZES) * len(BACKGROUNDS)
    return place == _hash(f"{thing.colour} {thing.shape}", choices)


def split_of(scene: Scene) -> str:
    """The split a scene belongs to: heldout if it has a held-out pair, else as `reserved` says."""
    if any(held_out(thing.colour, thing.shape) for thing in scene.things):
        return "heldout"
    return "validation" if reserved(scene) else "train"
