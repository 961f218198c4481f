"""Detect the objects of a scene from the pixels of an image, and score them against a prompt.

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
from jaxdiff.scenes.rendering import BACKGROUND_RGB, CANVAS, OBJECT_RGB, RADII, SHAPE_SDFS, coverage
from jaxdiff.scenes.specification import Scene

# Distances are Euclidean in RGB bytes. Any two colours of the palette are at least 95 apart.
BACKGROUND_TOLERANCE = 45.0  # from the palette's background, for the median of the border
CORE_TOLERANCE = 60.0  # from the palette's colour, for the pixels inside an object
CLUTTER_TOLERANCE = 60.0  # from the background, beyond which a pixel must belong to an object
BORDER = 2  # width of the frame whose median is the background
MIN_AREA = 24  # of a connected component; the smallest object has 110
CORE_MARGIN = 4.0  # around a core that belongs to the object: soft edges and thin points
# Minimal intersection over union with a shape's template. Blobs without a shape resemble circles
# and squares most, which in turn survive blur best, so these have higher thresholds.
MIN_IOU = {"circle": 0.9, "square": 0.88, "triangle": 0.8, "star": 0.8, "cross": 0.8, "ring": 0.8}
NUM_RAYS = 360  # from the centre, on which the outline of a circle is located
SIZE_THRESHOLD = (RADII["small"][1] * RADII["large"][0]) ** 0.5
RADIUS_RANGE = (0.75 * RADII["small"][0], 1.25 * RADII["large"][1])  # outside, neither size

Pixels = Float[NDArray, "h w 3"]


@dataclass(frozen=True, kw_only=True)
class DetectedObject:
    """An object in an image; None is a colour, shape or size that is none of the known ones.

    `centre` (x, y) and `radius` are in units of 1/64 of the side, `iou` is the intersection over
    union with the best shape.
    """

    colour: str | None
    shape: str | None
    size: str | None
    centre: tuple[float, float]
    radius: float
    iou: float


@dataclass(frozen=True, kw_only=True)
class DetectedScene:
    """The objects in an image; a background of None is not in the palette."""

    background: str | None
    objects: tuple[DetectedObject, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Which parts of a specification an image satisfies; None is unspecified.

    The tuples have one entry for each specified object. A missing object is wrong in all.
    """

    background: bool | None
    count: bool
    colours: tuple[bool, ...]
    shapes: tuple[bool, ...]
    sizes: tuple[bool | None, ...]
    relation: bool | None

    @property
    def all_correct(self) -> bool:
        """Whether the number of objects and everything that was specified is correct."""
        asked = (self.background, self.count, self.relation)
        return all(part is not False for part in (*asked, *self.colours, *self.shapes, *self.sizes))


def _nearest(pixels: Pixels, palette: dict[str, tuple[int, int, int]]) -> tuple[NDArray, NDArray]:
    """Index of the nearest palette colour, and the distance to it, for every pixel."""
    colours = np.array(list(palette.values()), np.float32)
    distances = np.linalg.norm(pixels[..., None, :] - colours, axis=-1)
    return distances.argmin(-1), distances.min(-1)


def _background(pixels: Pixels) -> tuple[str | None, NDArray]:
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


def _connected_components(mask: Bool[NDArray, "h w"]) -> Iterable[Bool[NDArray, "h w"]]:
    """Connected components (including diagonal neighbours) of at least MIN_AREA."""
    result: Any = ndimage.label(mask, structure=np.ones((3, 3)))
    labels, count = result
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    min_area = MIN_AREA * _scale(mask) ** 2
    return [labels == i for i in range(1, count + 1) if sizes[i] >= min_area]


def _cores(
    pixels: Pixels, stands_out: Bool[NDArray, "h w"]
) -> list[tuple[str, Bool[NDArray, "h w"]]]:
    """Connected areas of one of the palette's colours that stand out, with the colour's name."""
    index, distance = _nearest(pixels, OBJECT_RGB | BACKGROUND_RGB)
    index[(distance >= CORE_TOLERANCE) | ~stands_out] = -1
    names = enumerate(OBJECT_RGB)
    return [(name, area) for i, name in names for area in _connected_components(index == i)]


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


def _iou(a: Float[NDArray, "h w"], b: Float[NDArray, "h w"]) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _sharpen(mask: Float[NDArray, "h w"]) -> Float[NDArray, "h w"]:
    """Coverage with half as soft an edge, to reduce the effect of blur and colour bleeding."""
    return np.clip(2 * mask - 0.5, 0, 1)


def _best_shape(mask: Float[NDArray, "h w"]) -> tuple[float, str, tuple[float, float], float]:
    """IoU, name, centre and radius of the shape that fits best, with the mask's area and centroid.

    Centre and radius are in pixels.
    """
    area, x, y = _measure(mask)
    fits = []
    for name in SHAPE_SDFS:
        unit_area, dx, dy = _moments(name)
        radius = (area / unit_area) ** 0.5
        centre = (x - dx * radius, y - dy * radius)
        template = _sharpen(coverage(name, centre, radius, len(mask)))
        fits.append((_iou(mask, template), name, centre, radius))
    return max(fits)


def _detected_object(colour: str, mask: Float[NDArray, "h w"]) -> DetectedObject:
    iou, shape, (x, y), pixels = _best_shape(mask)
    scale = _scale(mask)
    centre, radius = (x / scale, y / scale), pixels / scale
    low, high = RADIUS_RANGE
    size = ("small" if radius < SIZE_THRESHOLD else "large") if low <= radius <= high else None
    name = shape if iou >= MIN_IOU[shape] else None
    return DetectedObject(
        colour=colour, shape=name, size=size, centre=centre, radius=radius, iou=iou
    )


def _unknown_object(mask: Bool[NDArray, "h w"]) -> DetectedObject:
    area, x, y = _measure(mask.astype(np.float32))
    scale = _scale(mask)
    centre, radius = (x / scale, y / scale), (area / np.pi) ** 0.5 / scale
    return DetectedObject(colour=None, shape=None, size=None, centre=centre, radius=radius, iou=0.0)


@dataclass(frozen=True, kw_only=True)
class _Core:
    """A component near one colour of the palette, and its coverage of each pixel."""

    colour: str
    coverage: Float[NDArray, "h w"]


@dataclass(frozen=True, kw_only=True)
class _Segments:
    """A segmented image; `unexplained` pixels differ from the background but belong to no core."""

    background: str | None
    cores: tuple[_Core, ...]
    unexplained: Bool[NDArray, "h w"]


def _segments(image: UInt8[NDArray, "h w 3"]) -> _Segments:
    side = max(len(image), CANVAS)
    require_shape("image", image, (side, side, 3))
    pixels = image.astype(np.float32)
    background, background_rgb = _background(pixels)
    stands_out = np.linalg.norm(pixels - background_rgb, axis=-1) > CLUTTER_TOLERANCE
    cores = _cores(pixels, stands_out)
    distances = np.array([ndimage.distance_transform_edt(~core) for _, core in cores])
    distances = distances.reshape(-1, side, side) / _scale(image)
    segments = []
    for i, (colour, core) in enumerate(cores):
        axis = np.median(pixels[core], axis=0) - background_rgb
        covered = np.clip((pixels - background_rgb) @ axis / (axis @ axis), 0, 1)
        nearest = (distances[i] <= CORE_MARGIN) & (distances[i] <= distances.min(axis=0))
        segments.append(
            _Core(colour=colour, coverage=np.where(nearest, covered, 0).astype(np.float32))
        )
    explained = (distances <= CORE_MARGIN).any(axis=0)
    return _Segments(
        background=background, cores=tuple(segments), unexplained=stands_out & ~explained
    )


def detect(image: UInt8[NDArray, "h w 3"]) -> DetectedScene:
    """Detect the objects in a square image of at least 64x64 pixels.

    The frame's median colour is the background. An object is a connected component near one colour
    of the palette. Its coverage of a pixel nearby is the pixel's position between the colours of
    background and object. Its shape is the one with the highest IoU at the same area and centroid;
    its size follows from that shape's radius. Other components that differ from the background are
    unknown objects. Components below MIN_AREA are ignored.
    """
    segments = _segments(image)
    objects = [_detected_object(core.colour, _sharpen(core.coverage)) for core in segments.cores]
    objects += [_unknown_object(area) for area in _connected_components(segments.unexplained)]
    return DetectedScene(background=segments.background, objects=tuple(objects))


def circle_deviation(image: UInt8[NDArray, "h w 3"]) -> float | None:
    """How much the only object deviates from a circle: mean |r - r0| / r0 over its outline.

    The outline is where a pixel is half covered, found along NUM_RAYS rays from the object's centre
    of mass; r0 is the mean of its distances. None unless there is one object whose outline every
    ray meets.
    """
    cores = _segments(image).cores
    if len(cores) != 1:
        return None
    coverage_map = cores[0].coverage
    area, x, y = _measure(coverage_map)
    steps = np.linspace(0.5, 1.5, 1 + 64) * (area / np.pi) ** 0.5
    angles = np.linspace(0, 2 * np.pi, NUM_RAYS, endpoint=False)[:, None]
    # pixel (i, j) has its centre at (j + 1/2, i + 1/2)
    places = [y + steps * np.sin(angles) - 0.5, x + steps * np.cos(angles) - 0.5]
    profiles = ndimage.map_coordinates(coverage_map, places, order=1)
    crosses = (profiles[:, :-1] >= 0.5) & (profiles[:, 1:] < 0.5)
    if not crosses.any(axis=1).all():
        return None
    rows, index = np.arange(NUM_RAYS), crosses.argmax(axis=1)
    inner, outer = profiles[rows, index], profiles[rows, index + 1]
    radius = steps[index] + (inner - 0.5) / (inner - outer) * (steps[1] - steps[0])
    return float(np.mean(np.abs(radius - radius.mean())) / radius.mean())


def _in_relation(relation: str, first: DetectedObject, second: DetectedObject) -> bool:
    """Whether `first` is, seen from `second`, mostly in the relation's direction."""
    dx, dy = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    forward = along if relation in ("right of", "below") else -along
    return forward > abs(across)


def _score_assignment(
    scene: Scene, detected: DetectedScene, assigned: tuple[DetectedObject | None, ...]
) -> Score:
    """The score if `assigned` are the specified objects, in this order."""

    def correct(name: str) -> tuple[bool, ...]:
        pairs = zip(scene.objects, assigned, strict=True)
        return tuple(
            seen is not None and getattr(seen, name) == getattr(obj, name) for obj, seen in pairs
        )

    relation = None
    if scene.relation is not None:
        first, second = assigned
        relation = bool(first and second and _in_relation(scene.relation, first, second))
    asked = scene.background
    return Score(
        background=None if asked is None else detected.background == asked,
        count=len(detected.objects) == len(scene.objects),
        colours=correct("colour"),
        shapes=correct("shape"),
        sizes=tuple(
            None if obj.size is None else hit
            for obj, hit in zip(scene.objects, correct("size"), strict=True)
        ),
        relation=relation,
    )


def _match_score(score: Score) -> tuple[int, int, int, bool]:
    """Sort key of assignments: colour and shape come first, size and relation break ties."""
    looks = sum(a and b for a, b in zip(score.colours, score.shapes, strict=True))
    return (
        looks,
        sum(score.colours) + sum(score.shapes),
        sum(map(bool, score.sizes)),
        bool(score.relation),
    )


def score(scene: Scene, detected: DetectedScene) -> Score:
    """Score an image against a specification, with the best assignment of its objects."""
    candidates = (*detected.objects, *[None] * len(scene.objects))
    orders = itertools.permutations(candidates, len(scene.objects))
    return max((_score_assignment(scene, detected, order) for order in orders), key=_match_score)
