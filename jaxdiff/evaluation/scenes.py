"""What a 64x64 picture shows, from its pixels alone, and whether that is what was asked for."""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from jaxdiff.core.types import Bool, Float, NDArray, UInt8
from jaxdiff.core.validate import check_shape as require_shape
from jaxdiff.data.drawing import BACKGROUND_RGB, CANVAS, RADII, SHAPE, THING_RGB, coverage
from jaxdiff.data.specification import Scene

# Distances are Euclidean in RGB bytes. Any two colours of the palette are at least 95 apart.
BACKGROUND_TOLERANCE = 45.0  # from the palette's background, for the median of the border
CORE_TOLERANCE = 60.0  # from the palette's colour, for the pixels inside a thing
CLUTTER_TOLERANCE = 60.0  # from the background, beyond which a pixel needs an explanation
BORDER = 2  # pixels of frame that tell the background
SPECK = 24  # connected areas of fewer pixels are ignored; the smallest thing has 110
REACH = 4.0  # pixels around its core that a thing explains: soft edges and thin points
# Least overlap (intersection over union) with a shape to be called by its name. Shapeless blobs
# come nearest to circles and squares, which in turn survive blur best: more is asked of these.
MATCH = {"circle": 0.9, "square": 0.88, "triangle": 0.8, "star": 0.8, "cross": 0.8, "ring": 0.8}
BETWEEN_SIZES = (RADII["small"][1] * RADII["large"][0]) ** 0.5
RADIUS_RANGE = (0.75 * RADII["small"][0], 1.25 * RADII["large"][1])  # outside, neither size

Picture = Float[NDArray, "h w 3"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One thing seen in a picture; None is what the judge has no name for.

    `centre` (x, y) and `radius` are in pixels, `match` is the overlap with the best shape.
    """

    colour: str | None
    shape: str | None
    size: str | None
    centre: tuple[float, float]
    radius: float
    match: float


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a picture shows; a background of None is none of the palette's."""

    background: str | None
    things: tuple[Found, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Which parts of a specification a picture has right; None is what the prompt left open.

    The tuples have one entry for each thing asked for. A thing that is missing is wrong in all.
    """

    background: bool | None
    count: bool
    colours: tuple[bool, ...]
    shapes: tuple[bool, ...]
    sizes: tuple[bool | None, ...]
    relation: bool | None

    @property
    def all_right(self) -> bool:
        """Whether the number of things and everything that was asked for is right."""
        asked = (self.background, self.count, self.relation)
        return all(part is not False for part in (*asked, *self.colours, *self.shapes, *self.sizes))


def _nearest(pixels: Picture, palette: dict[str, tuple[int, int, int]]) -> tuple[NDArray, NDArray]:
    """Index of the nearest palette colour, and the distance to it, for every pixel."""
    colours = np.array(list(palette.values()), np.float32)
    distances = np.linalg.norm(pixels[..., None, :] - colours, axis=-1)
    return distances.argmin(-1), distances.min(-1)


def _background(pixels: Picture) -> tuple[str | None, NDArray]:
    """The background's name and its measured colour: the median of the frame."""
    frame = np.ones(pixels.shape[:2], bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    colour = np.median(pixels[frame], axis=0)
    index, distance = _nearest(colour[None, None], BACKGROUND_RGB)
    near = distance.item() < BACKGROUND_TOLERANCE
    return (list(BACKGROUND_RGB)[index.item()] if near else None), colour


def _areas(mask: Bool[NDArray, "h w"]) -> Iterable[Bool[NDArray, "h w"]]:
    """Connected areas (neighbours include diagonals) that are more than a speck."""
    labelled: Any = ndimage.label(mask, structure=np.ones((3, 3)))
    labels, count = labelled
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == i for i in range(1, count + 1) if sizes[i] >= SPECK]


def _cores(
    pixels: Picture, stands_out: Bool[NDArray, "h w"]
) -> list[tuple[str, Bool[NDArray, "h w"]]]:
    """Connected areas of one of the palette's colours that stand out, with the colour's name."""
    index, distance = _nearest(pixels, THING_RGB | BACKGROUND_RGB)
    index[(distance >= CORE_TOLERANCE) | ~stands_out] = -1
    names = enumerate(THING_RGB)
    return [(name, area) for i, name in names for area in _areas(index == i)]


@functools.cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centre of mass (x, y from the box's centre) of a shape of radius 1."""
    radius = 20.0
    mask = coverage(shape, (CANVAS / 2, CANVAS / 2), radius)
    area, x, y = _measure(mask)
    return area / radius**2, (x - CANVAS / 2) / radius, (y - CANVAS / 2) / radius


def _measure(mask: Float[NDArray, "h w"]) -> tuple[float, float, float]:
    """Area and centre of mass of a soft mask, in pixels."""
    area = float(mask.sum())
    middle = np.arange(CANVAS) + 0.5
    return area, float(mask.sum(0) @ middle) / area, float(mask.sum(1) @ middle) / area


def _overlap(a: Float[NDArray, "h w"], b: Float[NDArray, "h w"]) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _steeper(mask: Float[NDArray, "h w"]) -> Float[NDArray, "h w"]:
    """Coverage with its soft edge halved, so that blur and bleeding colours weigh less."""
    return np.clip(2 * mask - 0.5, 0, 1)


def _best_shape(mask: Float[NDArray, "h w"]) -> tuple[float, str, tuple[float, float], float]:
    """Overlap, name, centre and radius of the shape that fits best at the mask's area and place."""
    area, x, y = _measure(mask)
    fits = []
    for name in SHAPE:
        unit_area, dx, dy = _moments(name)
        radius = (area / unit_area) ** 0.5
        centre = (x - dx * radius, y - dy * radius)
        template = _steeper(coverage(name, centre, radius))
        fits.append((_overlap(mask, template), name, centre, radius))
    return max(fits)


def _thing(colour: str, mask: Float[NDArray, "h w"]) -> Found:
    match, shape, centre, radius = _best_shape(mask)
    low, high = RADIUS_RANGE
    size = ("small" if radius < BETWEEN_SIZES else "large") if low <= radius <= high else None
    named = shape if match >= MATCH[shape] else None
    return Found(colour=colour, shape=named, size=size, centre=centre, radius=radius, match=match)


def _unnamed(mask: Bool[NDArray, "h w"]) -> Found:
    area, x, y = _measure(mask.astype(np.float32))
    radius = (area / np.pi) ** 0.5
    return Found(colour=None, shape=None, size=None, centre=(x, y), radius=radius, match=0.0)


def judge(image: UInt8[NDArray, "h w 3"]) -> Observation:
    """Name what is in a picture.

    The frame's median colour is the background. A thing is a connected area near one colour of
    the palette; how much of each pixel near it the thing covers is the pixel's place between the
    background's and the thing's own colour. Its shape is the one that overlaps best at the same
    area and centre of mass; its size comes from that shape's radius. Other areas that stand out
    from the background are things without a name. Areas below SPECK pixels are ignored.
    """
    require_shape("image", image, (CANVAS, CANVAS, 3))
    pixels = image.astype(np.float32)
    background, ground = _background(pixels)
    stands_out = np.linalg.norm(pixels - ground, axis=-1) > CLUTTER_TOLERANCE
    cores = _cores(pixels, stands_out)
    away = np.array([ndimage.distance_transform_edt(~core) for _, core in cores])
    away = away.reshape(-1, CANVAS, CANVAS)
    things = []
    for i, (colour, core) in enumerate(cores):
        axis = np.median(pixels[core], axis=0) - ground
        share = np.clip((pixels - ground) @ axis / (axis @ axis), 0, 1)
        mine = (away[i] <= REACH) & (away[i] <= away.min(axis=0))
        things.append(_thing(colour, _steeper(np.where(mine, share, 0).astype(np.float32))))
    explained = (away <= REACH).any(axis=0)
    things += [_unnamed(area) for area in _areas(stands_out & ~explained)]
    return Observation(background=background, things=tuple(things))


def _in_relation(relation: str, first: Found, second: Found) -> bool:
    """Whether `first` is, seen from `second`, mostly in the relation's direction."""
    dx, dy = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    forward = along if relation in ("right of", "below") else -along
    return forward > abs(across)


def _assigned(scene: Scene, observation: Observation, found: tuple[Found | None, ...]) -> Score:
    """The score when the things asked for are taken to be `found`, in this order."""

    def right(name: str) -> tuple[bool, ...]:
        pairs = zip(scene.things, found, strict=True)
        return tuple(
            seen is not None and getattr(seen, name) == getattr(thing, name)
            for thing, seen in pairs
        )

    relation = None
    if scene.relation is not None:
        first, second = found
        relation = bool(first and second and _in_relation(scene.relation, first, second))
    asked = scene.background
    return Score(
        background=None if asked is None else observation.background == asked,
        count=len(observation.things) == len(scene.things),
        colours=right("colour"),
        shapes=right("shape"),
        sizes=tuple(
            None if thing.size is None else hit
            for thing, hit in zip(scene.things, right("size"), strict=True)
        ),
        relation=relation,
    )


def _merit(score: Score) -> tuple[int, int, int, bool]:
    """Colour and shape tell which thing is meant; size and relation only break ties."""
    looks = sum(a and b for a, b in zip(score.colours, score.shapes, strict=True))
    return (
        looks,
        sum(score.colours) + sum(score.shapes),
        sum(map(bool, score.sizes)),
        bool(score.relation),
    )


def score(scene: Scene, observation: Observation) -> Score:
    """Compare a picture with what was asked for; things are matched to fit as well as they can."""
    candidates = (*observation.things, *[None] * len(scene.things))
    orders = itertools.permutations(candidates, len(scene.things))
    return max((_assigned(scene, observation, order) for order in orders), key=_merit)
