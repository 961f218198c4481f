"""What the images of a call are drawn from, as arrays with one row per image."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, Int, Key, NDArray
from jaxdiff.core.validate import check_shape
from jaxdiff.guidance.base import GuidanceScales
from jaxdiff.pipeline import given
from jaxdiff.pipeline.conditioning import Words
from jaxdiff.pipeline.request import Request
from jaxdiff.pipeline.steering import Steering
from jaxdiff.samplers.noise import per_sample_keys

T = TypeVar("T")
Noise = Float[NDArray, "b h w c"] | Float[Array, "b h w c"]


class Given(NamedTuple):
    """What a call begins with beside words, as its caller gave it."""

    image: given.Given = None  # pictures, or scaled latents
    mask: given.Given = None
    noise: Noise | None = None  # of unit variance, instead of the seeds'


class Asked(NamedTuple):
    """What the images of a call are asked to be, one row per image but for the words."""

    words: Sequence[Words]  # of each image
    time_ids: Float[NDArray, "b k i"] | None
    guide_words: Sequence[Words]  # what a weaker network is told; empty without one
    guide_time_ids: Float[NDArray, "b k i"] | None
    dials: GuidanceScales
    steering: Steering


class Inputs(NamedTuple):
    """Everything that differs between images."""

    words: Words
    time_ids: Float[NDArray, "b k i"] | None
    guide_words: Words | None
    guide_time_ids: Float[NDArray, "b k i"] | None
    dials: GuidanceScales
    steering: Steering
    keys: Key[Array, "b"]
    noise: Float[NDArray, "b h w c"] | None
    pictures: Float[NDArray, "b h2 w2 3"] | None  # in [-1, 1]
    latents: Float[NDArray, "b h w c"] | None  # in the place of pictures
    masks: Float[NDArray, "b h2 w2 1"] | None  # 1 where something is drawn

    def rows(self, rows: Int[NDArray, "r"]) -> "Inputs":
        """The inputs of some images."""
        return _rows(self, rows)


def _rows(tree: T, rows: Int[NDArray, "r"]) -> T:
    return jax.tree.map(lambda array: array[rows], tree)


def gather(
    request: Request,
    origin: Given,
    asked: Asked,
    latent_shape: tuple[int, int, int],
    size: int,
) -> Iterator[tuple[list[int], Inputs]]:
    """Batches of at most `size` images, each with the numbers of its images.

    The images of a batch have words in as many chunks: company must not change a picture. Raises
    InputError where what was given does not fit the request.
    """
    count, pixels = len(request.prompts), (request.height, request.width)
    pictures = latents = masks = noise = None
    if given.are_latents(origin.image, latent_shape[-1]):
        rows = np.asarray(origin.image, np.float32).reshape(-1, *np.shape(origin.image)[-3:])
        latents = _each("image", check_shape("image", rows, (None, *latent_shape)), count)
    elif origin.image is not None:
        pictures = _each("image", given.pictures(origin.image, *pixels), count)
    if origin.mask is not None:
        masks = _each("mask", given.masks(origin.mask, *pixels), count)
    if origin.noise is not None:
        noise = np.asarray(check_shape("latents", origin.noise, (count, *latent_shape)), np.float32)
    keys = per_sample_keys(request.seeds)
    each = (
        asked.guide_time_ids,
        asked.dials,
        asked.steering,
        keys,
        noise,
        pictures,
        latents,
        masks,
    )
    both = asked.words, asked.guide_words or asked.words
    lengths = [tuple(map(_chunks, pair)) for pair in zip(*both, strict=True)]
    for length in sorted(set(lengths)):
        alike = [i for i in range(count) if lengths[i] == length]
        for first in range(0, len(alike), size):
            chosen = alike[first : first + size]
            rows = np.array(chosen)
            guide = _stacked(asked.guide_words, chosen) if asked.guide_words else None
            own = _stacked(asked.words, chosen), _rows(asked.time_ids, rows), guide
            yield chosen, Inputs(*own, *_rows(each, rows))


def _chunks(words: Words) -> int:
    return words.ids[0].shape[1]


def _stacked(words: Sequence[Words], chosen: Sequence[int]) -> Words:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *(words[i] for i in chosen))


def _each(name: str, rows: NDArray, count: int) -> NDArray:
    """One row per image; a single one serves all."""
    if len(rows) not in (1, count):
        raise InputError(f"{name}: got {len(rows)} entries, expected 1 or {count}")
    return np.broadcast_to(rows, (count, *rows.shape[1:]))
