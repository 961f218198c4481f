"""What an image of a scene shows, from its pixels alone, and whether that is what was asked for.

Lengths are in the units of `scenes.rendering`, 1/64 of the image's side.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from jaxdiff.core.types import Bool, Float, NDArray, UInt8
from jaxdiff.core.validate import check_shape as require_shape
from jaxdiff.scenes.rendering import BACKGROUND_RGB, CANVAS, RADII, SHAPE, THING_RGB, coverage
from jaxdiff.scenes.specification import Scene

# Distances are Euclidean in RGB bytes. Any two colours of the palette are at least 95 apart.
BACKGROUND_TOLERANCE = 45.0  # from the palette's background, for the median of the border
CORE_TOLERANCE = 60.0  # from the palette's colour, for the pixels inside a thing
CLUTTER_TOLERANCE = 60.0  # from the background, beyond which a pixel needs an explanation
BORDER = 2  # of frame that tells the background
SPECK = 24  # smaller connected areas are ignored; that of the smallest thing is 110
REACH = 4.0  # around its core that a thing explains: soft edges and thin points
# Least overlap (intersection over union) with a shape to be called by its name. Shapeless blobs
# come nearest to circles and squares, which in turn survive blur best: more is asked of these.
MATCH = {"circle": 0.9, "square": 0.88, "triangle": 0.8, "star": 0.8, "cross": 0.8, "ring": 0.8}
RAYS = 360  # along which the outline of a circle is looked for
BETWEEN_SIZES = (RADII["small"][1] * RADII["large"][0]) ** 0.5
RADIUS_RANGE = (0.75 * RADII["small"][0], 1.25 * RADII["large"][1])  # outside, neither size

Picture = Float[NDArray, "h w 3"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One thing seen in a picture; None is what the judge has no name for.

    `centre` (x, y) and `radius` are in units of 1/64 of the side, `match` is the overlap with the
    best shape.
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
    frame, border = np.ones(pixels.shape[:2], bool), round(BORDER * _scale(pixels))
    frame[border:-border, border:-border] = False
    colour = np.median(pixels[frame], axis=0)
    index, distance = _nearest(colour[None, None], BACKGROUND_RGB)
    near = distance.item() < BACKGROUND_TOLERANCE
    return (list(BACKGROUND_RGB)[index.item()] if near else None), colour


def _scale(image: NDArray) -> float:
    """Pixels per unit of length."""
    return len(image) / CANVAS


def _areas(mask: Bool[NDArray, "h w"]) -> Iterable[Bool[NDArray, "h w"]]:
    """Connected areas (neighbours include diagonals) that are more than a speck."""
    labelled: Any = ndimage.label(mask, structure=np.ones((3, 3)))
    labels, count = labelled
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    least = SPECK * _scale(mask) ** 2
    return [labels == i for i in range(1, count + 1) if sizes[i] >= least]


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
    """Area and centre of mass (x, y) of a soft mask, in pixels."""
    area = float(mask.sum())
    middle = np.arange(len(mask)) + 0.5
    return area, float(mask.sum(0) @ middle) / area, float(mask.sum(1) @ middle) / area


def _overlap(a: Float[NDArray, "h w"], b: Float[NDArray, "h w"]) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _steeper(mask: Float[NDArray, "h w"]) -> Float[NDArray, "h w"]:
    """Coverage with its soft edge halved, so that blur and bleeding colours weigh less."""
    return np.clip(2 * mask - 0.5, 0, 1)


def _best_shape(mask: Float[NDArray, "h w"]) -> tuple[float, str, tuple[float, float], float]:
    """Overlap, name, centre and radius of the shape that fits best at the mask's area and place.

    Centre and radius are in pixels.
    """
    area, x, y = _measure(mask)
    fits = []
    for name in SHAPE:
        unit_area, dx, dy = _moments(name)
        radius = (area / unit_area) ** 0.5
        centre = (x - dx * radius, y - dy * radius)
        template = _steeper(coverage(name, centre, radius, len(mask)))
        fits.append((_overlap(mask, template), name, centre, radius))
    return max(fits)


def _thing(colour: str, mask: Float[NDArray, "h w"]) -> Found:
    match, shape, (x, y), pixels = _best_shape(mask)
    scale = _scale(mask)
    centre, radius = (x / scale, y / scale), pixels / scale
    low, high = RADIUS_RANGE
    size = ("small" if radius < BETWEEN_SIZES else "large") if low <= radius <= high else None
    named = shape if match >= MATCH[shape] else None
    return Found(colour=colour, shape=named, size=size, centre=centre, radius=radius, match=match)


def _unnamed(mask: Bool[NDArray, "h w"]) -> Found:
    area, x, y = _measure(mask.astype(np.float32))
    scale = _scale(mask)
    centre, radius = (x / scale, y / scale), (area / np.pi) ** 0.5 / scale
    return Found(colour=None, shape=None, size=None, centre=centre, radius=radius, match=0.0)


@dataclass(frozen=True, kw_only=True)
class _Core:
    """An area near one colour of the palette, and the share of each pixel that it covers."""

    colour: str
    share: Float[NDArray, "h w"]


@dataclass(frozen=True, kw_only=True)
class _Segments:
    """A picture taken apart; `unexplained` are pixels that stand out and belong to no core."""

    background: str | None
    cores: tuple[_Core, ...]
    unexplained: Bool[NDArray, "h w"]


def _segments(image: UInt8[NDArray, "h w 3"]) -> _Segments:
    side = max(len(image), CANVAS)
    require_shape("image", image, (side, side, 3))
    pixels = image.astype(np.float32)
    background, ground = _background(pixels)
    stands_out = np.linalg.norm(pixels - ground, axis=-1) > CLUTTER_TOLERANCE
    cores = _cores(pixels, stands_out)
    away = np.array([ndimage.distance_transform_edt(~core) for _, core in cores])
    away = away.reshape(-1, side, side) / _scale(image)
    found = []
    for i, (colour, core) in enumerate(cores):
        axis = np.median(pixels[core], axis=0) - ground
        share = np.clip((pixels - ground) @ axis / (axis @ axis), 0, 1)
        mine = (away[i] <= REACH) & (away[i] <= away.min(axis=0))
        found.append(_Core(colour=colour, share=np.where(mine, share, 0).astype(np.float32)))
    explained = (away <= REACH).any(axis=0)
    return _Segments(background=background, cores=tuple(found), unexplained=stands_out & ~explained)


def judge(image: UInt8[NDArray, "h w 3"]) -> Observation:
    """Name what is in a square picture of at least 64x64 pixels.

    The frame's median colour is the background. A thing is a connected area near one colour of
    the palette; how much of each pixel near it the thing covers is the pixel's place between the
    background's and the thing's own colour. Its shape is the one that overlaps best at the same
    area and centre of mass; its size comes from that shape's radius. Other areas that stand out
    from the background are things without a name. Areas below SPECK are ignored.
    """
    parts = _segments(image)
    things = [_thing(core.colour, _steeper(core.share)) for core in parts.cores]
    things += [_unnamed(area) for area in _areas(parts.unexplained)]
    return Observation(background=parts.background, things=tuple(things))


def circle_deviation(image: UInt8[NDArray, "h w 3"]) -> float | None:
    """How far from round the only object of a picture is: mean |r - r0| / r0 over its outline.

    The outline is where a pixel is half covered, found along RAYS rays from the object's centre of
    mass; r0 is the mean of its distances. None unless there is one object whose outline every ray
    meets.
    """
    cores = _segments(image).cores
    if len(cores) != 1:
        return None
    share = cores[0].share
    area, x, y = _measure(share)
    steps = np.linspace(0.5, 1.5, 1 + 64) * (area / np.pi) ** 0.5
    angles = np.linspace(0, 2 * np.pi, RAYS, endpoint=False)[:, None]
    # pixel (i, j) has its centre at (j + 1/2, i + 1/2)
    places = [y + steps * np.sin(angles) - 0.5, x + steps * np.cos(angles) - 0.5]
    along = ndimage.map_coordinates(share, places, order=1)
    left = (along[:, :-1] >= 0.5) & (along[:, 1:] < 0.5)
    if not left.any(axis=1).all():
        return None
    rows, at = np.arange(RAYS), left.argmax(axis=1)
    inner, outer = along[rows, at], along[rows, at + 1]
    radius = steps[at] + (inner - 0.5) / (inner - outer) * (steps[1] - steps[0])
    return float(np.mean(np.abs(radius - radius.mean())) / radius.mean())


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
