"""Scenes as images of any size: anti-aliased signed distance functions.

Lengths are in units of 1/64 of the image's side, whatever its size in pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray, UInt8
from jaxdiff.scenes.specification import Scene, arrangement

CANVAS = 64  # units along a side of every image, and pixels of an image whose size is not given

# Radii; the shapes below turn a radius into areas that look equally large.
RADII = {"small": (8.2, 9.0), "large": (12.6, 13.2)}

MARGIN = 1.5  # at the border
GAP = 3.0  # least distance between two objects along their axis
GAP_JITTER = 5.0
CENTRE_JITTER = 6.0
OFFSET_JITTER = 2.0  # each object's shift across the axis: far less than their distance along it
NUM_LAYOUT_UNIFORMS = 7  # random numbers that `layout_objects` takes

OBJECT_RGB = {
    "red": (215, 20, 40),
    "green": (30, 150, 60),
    "blue": (30, 70, 220),
    "yellow": (250, 225, 30),
    "orange": (245, 125, 10),
    "purple": (140, 40, 170),
    "cyan": (40, 200, 220),
    "black": (20, 20, 20),
}
BACKGROUND_RGB = {"white": (255, 255, 255), "grey": (165, 165, 165), "pink": (255, 170, 195)}

Grid = Float[NDArray, "h w"]


@dataclass(frozen=True, kw_only=True)
class ObjectLayout:
    """Where the objects are: the centre (x, y) of each one's bounding box and its radius, in units.

    Of an image of 64x64, pixel (row i, column j) covers x in [j, j+1], y in [i, i+1].
    """

    centres: tuple[tuple[float, float], ...]
    radii: tuple[float, ...]


def _disc(x: Grid, y: Grid, r: float) -> Grid:
    return np.hypot(x, y) - r


def _box(x: Grid, y: Grid, half_width: float, half_height: float) -> Grid:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _ring(x: Grid, y: Grid, r: float) -> Grid:
    outer, inner = r, 0.5 * r
    return np.abs(np.hypot(x, y) - (outer + inner) / 2) - (outer - inner) / 2


def _cross(x: Grid, y: Grid, r: float) -> Grid:
    arm = 0.36 * r
    return np.minimum(_box(x, y, r, arm), _box(x, y, arm, r))


def _star_polygon(x: Grid, y: Grid, points: int, outer: float, inner: float) -> Grid:
    """A polygon of `points` corners at radius `outer`, one upward, and as many at `inner` between.

    Every edge is the first one after folding the plane about the corners' axes.
    """
    half = math.pi / points
    radius = np.hypot(x, y)
    angle = np.abs(np.mod(np.arctan2(x, -y) + half, 2 * half) - half)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    edge_x, edge_y = inner * math.cos(half) - outer, inner * math.sin(half)
    length = math.hypot(edge_x, edge_y)
    return ((along - outer) * edge_y - across * edge_x) / length


def _triangle(x: Grid, y: Grid, r: float) -> Grid:
    outer = 1.22 * r
    # Equilateral; its box reaches from -outer to outer / 2, so its centre is outer / 4 higher.
    return _star_polygon(x, y - outer / 4, 3, outer, outer / 2)


def _star(x: Grid, y: Grid, r: float) -> Grid:
    outer = 1.15 * r
    return _star_polygon(x, y - outer * (1 - math.cos(math.pi / 5)) / 2, 5, outer, 0.47 * outer)


@dataclass(frozen=True, kw_only=True)
class ShapeSDF:
    """A signed distance (x, y, radius), negative inside; half width and height per radius."""

    distance: Callable[[Grid, Grid, float], Grid]
    extent: tuple[float, float]


SHAPE_SDFS = {
    "circle": ShapeSDF(distance=_disc, extent=(1.0, 1.0)),
    "square": ShapeSDF(distance=lambda x, y, r: _box(x, y, 0.9 * r, 0.9 * r), extent=(0.9, 0.9)),
    "triangle": ShapeSDF(distance=_triangle, extent=(1.22 * math.sqrt(3) / 2, 1.22 * 3 / 4)),
    "star": ShapeSDF(
        distance=_star,
        extent=(1.15 * math.sin(2 * math.pi / 5), 1.15 * (1 + math.cos(math.pi / 5)) / 2),
    ),
    "cross": ShapeSDF(distance=_cross, extent=(1.0, 1.0)),
    "ring": ShapeSDF(distance=_ring, extent=(1.0, 1.0)),
}


def coverage(
    shape: str, centre: tuple[float, float], radius: float, size: int = CANVAS
) -> Float[NDArray, "s s"]:
    """The fraction of each pixel that the shape covers: a ramp one pixel wide at its edge.

    Centre and radius are in pixels of the image, which is `size` pixels wide.
    """
    mask = np.zeros((size, size), np.float32)
    reach = int(1.2 * radius) + 2
    column, row = (max(0, int(c) - reach) for c in centre)
    columns = np.arange(column, min(size, column + 2 * reach + 2), dtype=np.float32)
    rows = np.arange(row, min(size, row + 2 * reach + 2), dtype=np.float32)
    x, y = np.meshgrid(columns + 0.5 - np.float32(centre[0]), rows + 0.5 - np.float32(centre[1]))
    inside = np.clip(0.5 - SHAPE_SDFS[shape].distance(x, y, radius), 0, 1)
    mask[row : row + len(rows), column : column + len(columns)] = inside
    return mask


def _symmetric(u: float, bound: float) -> float:
    """A uniform number in [0, 1) as one in [-bound, bound)."""
    return (2 * u - 1) * bound


def _layout_pair(
    extents: list[tuple[float, float]], axis: int, u: list[float]
) -> list[list[float]]:
    """Centres of two objects, low coordinate first along `axis` (0 for x, 1 for y)."""
    along = [extent[axis] for extent in extents]
    across = [extent[1 - axis] for extent in extents]
    slack = CANVAS - 2 * MARGIN - 2 * sum(along)
    gap = GAP + u[2] * min(GAP_JITTER, slack - GAP)
    free = (slack - gap) / 2
    start = MARGIN + free + _symmetric(u[3], min(free, CENTRE_JITTER))
    positions = (start + along[0], start + 2 * along[0] + gap + along[1])
    room = CANVAS / 2 - MARGIN - OFFSET_JITTER - max(across)
    middle = CANVAS / 2 + _symmetric(u[4], min(room, CENTRE_JITTER))
    centres = []
    for position, shift in zip(positions, u[5:7], strict=True):
        centre = [position, position]
        centre[1 - axis] = middle + _symmetric(shift, OFFSET_JITTER)
        centres.append(centre)
    return centres


def layout_objects(scene: Scene, uniforms: Float[NDArray, "n"]) -> ObjectLayout:
    """The layout from NUM_LAYOUT_UNIFORMS numbers in [0, 1); 0.5 everywhere is the centre.

    Objects never touch or leave the image, and are clearly in their relation. Raises InputError if
    a size is unspecified.
    """
    objects, axis = arrangement(scene)
    u = [float(value) for value in uniforms]
    radii, extents = [], []
    for obj, v in zip(objects, u, strict=False):
        if obj.size is None:
            raise InputError("scene: got an object without a size, expected a full specification")
        low, high = RADII[obj.size]
        radius = low + v * (high - low)
        radii.append(radius)
        extents.append(
            (radius * SHAPE_SDFS[obj.shape].extent[0], radius * SHAPE_SDFS[obj.shape].extent[1])
        )
    if axis is None:
        centres = [[CANVAS / 2 + _symmetric(v, CENTRE_JITTER) for v in u[3:5]]]
    else:
        centres = _layout_pair(extents, 0 if axis == "left of" else 1, u)
    order = -1 if objects != scene.objects else 1
    return ObjectLayout(
        centres=tuple((x, y) for x, y in centres)[::order], radii=tuple(radii)[::order]
    )


def render(
    scene: Scene, layout: ObjectLayout | None = None, size: int = CANVAS
) -> UInt8[NDArray, "s s 3"]:
    """The image of a full specification, by default with the central layout.

    It is `size` pixels wide and high. Raises InputError if a size or the background is unspecified.
    """
    if scene.background is None:
        raise InputError("scene: got no background, expected a full specification")
    layout = layout or layout_objects(scene, np.full(NUM_LAYOUT_UNIFORMS, 0.5))
    scale = size / CANVAS
    image = np.full((size, size, 3), BACKGROUND_RGB[scene.background], np.float32)
    for obj, centre, radius in zip(scene.objects, layout.centres, layout.radii, strict=True):
        x, y = centre
        mask = coverage(obj.shape, (x * scale, y * scale), radius * scale, size)[..., None]
        image += mask * (np.array(OBJECT_RGB[obj.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)
