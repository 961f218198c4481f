"""One batch of images through all stages: from inputs to pictures."""

import contextlib
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import jax
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray, UInt8
from jaxdiff.diffusion.timesteps import TimestepGrid
from jaxdiff.guidance.base import Guidance
from jaxdiff.pipeline import given
from jaxdiff.pipeline.inputs import Inputs
from jaxdiff.pipeline.request import Request
from jaxdiff.pipeline.stages import Report, Stages, Told
from jaxdiff.pipeline.tiling import in_tiles
from jaxdiff.samplers.registry import get_sampler


class Plan(NamedTuple):
    """What all images of a call have in common."""

    request: Request
    grid: TimestepGrid
    span: tuple[int, int]
    rule: Guidance
    guide: Stages | None  # those of a weaker model
    start: str  # see `Stages.denoise`
    decode: bool
    tile: int | None  # of the VAE, in pixels
    report: Report | None
    watch: tuple[int, ...]  # steps whose latents are kept


class Drawn(NamedTuple):
    """What came of one batch."""

    images: NDArray  # pictures, or latents
    watched: Float[NDArray, "b n 2 h w c"]  # in each watched step: x where it starts, and its D


class Clock:
    """Seconds by stage, those of compiling counted apart."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._started = time.perf_counter()
        self._compiled = stages.compile_s
        self._seconds = {"encode_s": 0.0, "sample_s": 0.0, "decode_s": 0.0}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started, compiled = time.perf_counter(), self._stages.compile_s
        yield
        compiling = self._stages.compile_s - compiled
        self._seconds[stage] += time.perf_counter() - started - compiling

    def timings(self) -> dict[str, float]:
        return self._seconds | {
            "compile_s": self._stages.compile_s - self._compiled,
            "total_s": time.perf_counter() - self._started,
        }


class Batches:
    """Draws batches of images with the compiled stages of a model."""

    def __init__(
        self,
        stages: Stages,
        *,
        cell: int,
        channels: int,
        fills_in: bool,
        told_scale: bool,
        devices: int,
    ) -> None:
        self._stages = stages
        self._cell = cell  # pixels along the side of a latent
        self._channels = channels  # of latents
        self._fills_in = fills_in  # whether the network is told a mask and what is around it
        self._told_scale = told_scale  # whether the network was taught guidance
        self._devices = devices

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """Height, width and channels of the latents of a picture."""
        return request.height // self._cell, request.width // self._cell, self._channels

    def draw(self, inputs: Inputs, plan: Plan, size: int, clock: Clock) -> Drawn:
        """One batch, padded to `size` and to the devices by repeating its last image."""
        count = len(inputs.dials.scale)
        size = -(-size // self._devices) * self._devices
        inputs = inputs.rows(np.minimum(np.arange(size), count - 1))
        with clock("encode_s"):
            told, latents, mask = self._told(inputs, plan)
        with clock("sample_s"):
            noise = inputs.noise
            if noise is None:
                noise = self._stages.noise(inputs.keys, self.latent_shape(plan.request))
            latents, seen = self._stages.denoise(
                noise,
                told,
                inputs.dials,
                plan.grid,
                inputs.keys,
                sampler=get_sampler(plan.request.sampler, plan.request.eta),
                rule=plan.rule,
                span=plan.span,
                steering=inputs.steering,
                start=plan.start,
                given=latents,
                mask=mask,
                report=plan.report,
                watch=plan.watch,
            )
        watched = np.asarray(seen, np.float32).reshape(len(seen), 2, *latents.shape)
        watched = np.moveaxis(watched, 2, 0)
        if not plan.decode:
            return Drawn(latents[:count], watched[:count])
        with clock("decode_s"):
            return Drawn(self.pictures(latents, plan.tile)[:count], watched[:count])

    def pictures(
        self, latents: Float[NDArray, "b h w c"], tile: int | None
    ) -> UInt8[NDArray, "b h2 w2 3"]:
        """The VAE's pictures of latents, in tiles of so many pixels or as a whole."""
        decode, zoom, count = self._stages.decode, Fraction(self._cell), len(latents)
        padded = -(-count // self._devices) * self._devices
        latents = latents[np.minimum(np.arange(padded), count - 1)]
        if tile is None:
            return decode(latents)[:count]
        pictures = in_tiles(decode, latents, tile=tile // self._cell, cell=1, zoom=zoom)
        return np.round(pictures).astype(np.uint8)[:count]

    def _latents(self, pictures: NDArray, tile: int | None) -> Float[NDArray, "b h w c"]:
        """The VAE's latents of pictures, in tiles of so many pixels or as a whole."""
        encode, zoom = self._stages.latents, Fraction(1, self._cell)
        if tile is None:
            return encode(pictures)
        return in_tiles(encode, pictures, tile=tile, cell=self._cell, zoom=zoom)

    def _told(self, inputs: Inputs, plan: Plan) -> tuple[Told, NDArray | None, NDArray | None]:
        """What the networks are told, the latents given, and the mask outside of which they stay.

        A network that fills in is told mask and surroundings, and needs no other hold on them; told
        of neither picture nor mask, everything is to be drawn.
        """
        latents, mask, channels = inputs.latents, None, None
        if inputs.pictures is not None:
            latents = self._latents(inputs.pictures, plan.tile)
        if inputs.masks is not None:
            mask = given.shrink(inputs.masks, self._cell)
        if self._fills_in:
            channels = self._surroundings(inputs, plan, mask)
            mask = None
        skip = plan.request.clip_skip
        told = self._stages.encode(
            inputs.words,
            skip=skip,
            time_ids=inputs.time_ids,
            channels=channels,
            scales=np.asarray(inputs.dials.scale) if self._told_scale else None,
        )
        guide = None
        if inputs.guide_words is not None and plan.guide is not None:
            guide = plan.guide.encode(inputs.guide_words, skip=skip, time_ids=inputs.guide_time_ids)
        return jax.block_until_ready(Told(told, guide)), latents, mask

    def _surroundings(
        self, inputs: Inputs, plan: Plan, mask: NDArray | None
    ) -> Float[NDArray, "b k h w c"]:
        """The mask and the latents of what is around it, for a network that fills in."""
        count, shape = len(inputs.dials.scale), self.latent_shape(plan.request)
        if mask is None:
            mask = np.ones((count, *shape[:2], 1), np.float32)
        around = np.zeros((count, plan.request.height, plan.request.width, 3), np.float32)
        if inputs.masks is not None:
            if inputs.pictures is None:
                raise InputError("image: got latents with a mask, expected a picture")
            around = inputs.pictures * (1 - inputs.masks)
        channels = np.concatenate([mask, self._latents(around, plan.tile)], axis=-1)
        return np.repeat(channels[:, None], inputs.words.blank.shape[1], axis=1)
