"""The inputs of the images of a call, as arrays with one row per image."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, Int, Key, NDArray
from jaxdiff.core.validate import check_shape
from jaxdiff.diffusion.timesteps import TimestepGrid
from jaxdiff.guidance.base import GuidanceScales
from jaxdiff.pipeline import image_inputs
from jaxdiff.pipeline.classifier_guidance import GuidanceTargets
from jaxdiff.pipeline.compiled_model import StartLevel
from jaxdiff.pipeline.conditioning import TokenizedPrompts
from jaxdiff.pipeline.request import Requests
from jaxdiff.samplers.noise import per_sample_keys

T = TypeVar("T")
Noise = Float[NDArray, "b h w c"] | Float[Array, "b h w c"]


class InitImage(NamedTuple):
    """The image, mask and noise that the caller gave."""

    image: image_inputs.ImageInput = None  # images, or scaled latents
    mask: image_inputs.ImageInput = None
    noise: Noise | None = None  # of unit variance, instead of the seeds'


class TokenizedRequests(NamedTuple):
    """Tokenized requests, one row per image but for the prompts."""

    prompts: Sequence[TokenizedPrompts]  # of each image
    guidance_model_prompts: Sequence[TokenizedPrompts]  # for a weaker network; empty without one
    guidance_scales: GuidanceScales
    targets: GuidanceTargets


class BatchInputs(NamedTuple):
    """Everything that differs between images."""

    prompts: TokenizedPrompts
    guidance_model_prompts: TokenizedPrompts | None
    guidance_scales: GuidanceScales
    targets: GuidanceTargets
    grid: TimestepGrid
    start: StartLevel
    keys: Key[Array, "b"]
    noise: Float[NDArray, "b h w c"] | None
    images: Float[NDArray, "b h2 w2 3"] | None  # in [-1, 1]
    latents: Float[NDArray, "b h w c"] | None  # instead of images
    masks: Float[NDArray, "b h2 w2 1"] | None  # 1 where the image is repainted

    def take(self, rows: Int[NDArray, "r"]) -> "BatchInputs":
        """The inputs of some images."""
        return _rows(self, rows)


def _rows(tree: T, rows: Int[NDArray, "r"]) -> T:
    return jax.tree.map(lambda array: array[rows], tree)


def make_batches(
    requests: Requests,
    init: InitImage,
    tokenized: TokenizedRequests,
    grid: TimestepGrid,
    start: StartLevel,
    latent_shape: tuple[int, int, int],
    size: int,
) -> Iterator[tuple[list[int], BatchInputs]]:
    """Batches of at most `size` images, each with the numbers of its images.

    The images of a batch have one batch key, and their prompts equally many chunks, so that an
    image does not depend on its batch. `grid` and `start` have one row for each image. Raises
    InputError where the inputs do not fit the requests.
    """
    count, pixels = len(requests), (requests[0].height, requests[0].width)
    images = latents = masks = noise = None
    if image_inputs.are_latents(init.image, latent_shape[-1]):
        rows = np.asarray(init.image, np.float32).reshape(-1, *np.shape(init.image)[-3:])
        latents = _each("image", check_shape("image", rows, (None, *latent_shape)), count)
    elif init.image is not None:
        images = _each("image", image_inputs.image_array(init.image, *pixels), count)
    if init.mask is not None:
        masks = _each("mask", image_inputs.masks(init.mask, *pixels), count)
    if init.noise is not None:
        noise = np.asarray(check_shape("latents", init.noise, (count, *latent_shape)), np.float32)
    keys = per_sample_keys(requests.seeds)
    each = (
        tokenized.guidance_scales,
        tokenized.targets,
        grid,
        start,
        keys,
        noise,
        images,
        latents,
        masks,
    )
    both = tokenized.prompts, tokenized.guidance_model_prompts or tokenized.prompts
    lengths = [tuple(map(_chunks, pair)) for pair in zip(*both, strict=True)]
    for length in sorted(set(lengths)):
        alike = [i for i in range(count) if lengths[i] == length]
        for first in range(0, len(alike), size):
            chosen = alike[first : first + size]
            rows = np.array(chosen)
            guide = (
                _stacked(tokenized.guidance_model_prompts, chosen)
                if tokenized.guidance_model_prompts
                else None
            )
            own = _stacked(tokenized.prompts, chosen), guide
            yield chosen, BatchInputs(*own, *_rows(each, rows))


def _chunks(words: TokenizedPrompts) -> int:
    return words.ids[0].shape[1]


def _stacked(words: Sequence[TokenizedPrompts], chosen: Sequence[int]) -> TokenizedPrompts:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *(words[i] for i in chosen))


def _each(name: str, rows: NDArray, count: int) -> NDArray:
    """One row per image; a single one serves all."""
    if len(rows) not in (1, count):
        raise InputError(f"{name}: got {len(rows)} entries, expected 1 or {count}")
    return np.broadcast_to(rows, (count, *rows.shape[1:]))
