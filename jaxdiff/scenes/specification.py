"""The specification of a scene (objects, relation, background) and the splits of scenes."""

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

# Never in training, at any size or position, alone or beside another object: they measure
# composition.
HELD_OUT_PAIRS = frozenset(
    {("purple", "star"), ("green", "ring"), ("orange", "cross"), ("blue", "triangle")}
)

# One in this many arrangements of two objects belongs to the validation split.
VALIDATION_ONE_IN = 10


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object; a size of None is unspecified."""

    colour: str
    shape: str
    size: str | None = None

    def __post_init__(self) -> None:
        one_of("colour", self.colour, COLOURS)
        one_of("shape", self.shape, SHAPES)
        one_of("size", self.size, (*SIZES, None))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two objects; `relation` is where the first is, seen from the second.

    A background of None is unspecified. Raises InputError for a relation without two objects, two
    objects without a relation, or two objects of the same colour and shape (the relation would mean
    nothing).
    """

    objects: tuple[SceneObject, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        one_of("number of objects", len(self.objects), (1, 2))
        one_of("relation", self.relation, RELATIONS if len(self.objects) == 2 else (None,))
        one_of("background", self.background, (*BACKGROUNDS, None))
        looks = {(obj.colour, obj.shape) for obj in self.objects}
        if len(looks) < len(self.objects):
            raise InputError(
                f"objects: got {looks} twice, expected two of different colour or shape"
            )


def is_held_out_pair(colour: str, shape: str) -> bool:
    """Whether this colour of this shape never occurs in training."""
    return (colour, shape) in HELD_OUT_PAIRS


def arrangement(scene: Scene) -> tuple[tuple[SceneObject, ...], str | None]:
    """Objects ordered left to right or top to bottom, and "left of", "above" or None.

    "A right of B" and "B left of A" look the same and have one arrangement.
    """
    if scene.relation in ("right of", "below"):
        axis = {"right of": "left of", "below": "above"}[scene.relation]
        return scene.objects[::-1], axis
    return scene.objects, scene.relation


def _hash(words: str, buckets: int) -> int:
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % buckets


def is_validation_scene(scene: Scene) -> bool:
    """Whether a scene belongs to the validation split: the same for every seed and machine.

    Two objects: one in VALIDATION_ONE_IN of (colour and shape of both, order, axis), whatever
    the sizes and the background, so that no caption of such a scene occurs in training. One
    object: for each colour and shape one of its six (size, background), which must be specified.
    """
    objects, axis = arrangement(scene)
    if axis is not None:
        words = " ".join(f"{only.colour} {only.shape}" for only in objects)
        return _hash(f"{words} {axis}", VALIDATION_ONE_IN) == 0
    (only,) = objects
    if only.size is None or scene.background is None:
        raise InputError("scene: got one object without a size or a background, expected both")
    place = SIZES.index(only.size) * len(BACKGROUNDS) + BACKGROUNDS.index(scene.background)
    choices = len(SIZES) * len(BACKGROUNDS)
    return place == _hash(f"{only.colour} {only.shape}", choices)


def split_of(scene: Scene) -> str:
    """The split of a scene: heldout if it has a held-out pair, else validation or train."""
    if any(is_held_out_pair(obj.colour, obj.shape) for obj in scene.objects):
        return "heldout"
    return "validation" if is_validation_scene(scene) else "train"
