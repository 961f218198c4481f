"""Aspect-ratio buckets: a few image sizes of about one area, so that little is cropped away.

All images of a batch have the size of one bucket, so a training compiles once for each.
"""

import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Int, NDArray
from jaxdiff.core.validate import in_range, positive
from jaxdiff.data.bad_samples import BadSampleError
from jaxdiff.data.preprocessing import HEAD, size_of
from jaxdiff.data.sources import ImageSource
from jaxdiff.data.sources.storage import UNREADABLE

Size = tuple[int, int]  # height, width

READERS = 16  # images whose beginnings are read at the same time


def bucket_sizes(
    resolution: int, *, multiple: int = 64, max_aspect_ratio: float = 1.0
) -> list[Size]:
    """Sizes (height, width) in multiples of `multiple`, from the tallest to the widest.

    Each has the largest area up to `resolution` squared for its longer side, and sides whose ratio
    is at most `max_aspect_ratio`. With 1 there is only the square.
    """
    positive("cell", multiple)
    if resolution < 1 or resolution % multiple:
        raise InputError(f"resolution: got {resolution}, expected a multiple of {multiple}")
    in_range("widest", max_aspect_ratio, 1, 16)
    sizes = {(resolution, resolution)}
    long = resolution + multiple
    while (
        short := resolution**2 // long // multiple * multiple
    ) and long <= max_aspect_ratio * short:
        sizes |= {(long, short), (short, long)}
        long += multiple
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))


def assign_buckets(
    sizes: Int[NDArray, "n 2"], buckets: Sequence[Size], batch_size: int
) -> list[tuple[Size, Int[NDArray, "m"]]]:
    """Each bucket that is used, with the positions of the images in it, in their order.

    An image goes where the ratio of the sides is nearest; one of unknown size (0, 0) counts as a
    square. A bucket that cannot fill a batch gives its images to the nearest one that is used,
    the smallest bucket first.
    """
    ratios = np.log([width / height for height, width in buckets])
    known = np.maximum(sizes, 1).astype(np.float64)
    wanted = np.log(known[:, 1] / known[:, 0])
    # Between neighbouring ratios the border is half-way: no table of n times buckets is made.
    chosen = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, wanted)
    counts = np.bincount(chosen, minlength=len(buckets))
    while (used := np.flatnonzero(counts)).size > 1:
        small = used[np.argmin(counts[used])]
        if counts[small] >= batch_size:
            break
        others = used[used != small]
        near = others[np.argmin(np.abs(ratios[others] - ratios[small]))]
        chosen[chosen == small] = near
        counts[near], counts[small] = counts[near] + counts[small], 0
    used = np.flatnonzero(counts).tolist()
    return [(buckets[i], np.flatnonzero(chosen == i)) for i in used]


def read_image_sizes(source: ImageSource, cache: pathlib.Path) -> Int[NDArray, "n 2"]:
    """Height and width of every image, (0, 0) for broken ones; kept in the folder `cache`.

    Reads the beginning of each image once. InputError if one cannot be read now but perhaps
    later: other processes might have read it.
    """
    sizes_file = cache / f"sizes-{source.fingerprint}.npy"
    if sizes_file.exists():
        return np.load(sizes_file)

    def measure(index: int) -> Size:
        try:
            try:
                return size_of(source.head(index, HEAD))
            except BadSampleError as error:
                if str(error) == UNREADABLE:
                    raise InputError(f"data: item {index}: got an unreadable file") from None
                return size_of(source[index]["image"])
        except BadSampleError:
            return 0, 0

    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(measure, range(len(source)), chunksize=64))
    sizes = np.array(found, np.int32).reshape(-1, 2)
    with atomic_file(sizes_file) as temporary, temporary.open("wb") as file:
        np.save(file, sizes)
    return sizes
