"""One batch of images through all stages: from inputs to images."""

import contextlib
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import jax
import numpy as np

from jaxdiff.core.types import Float, NDArray, UInt8
from jaxdiff.diffusion.timesteps import TimestepGrid
from jaxdiff.families.base import ExtraInputs
from jaxdiff.guidance.base import Guidance
from jaxdiff.pipeline import image_inputs
from jaxdiff.pipeline.compiled_model import (
    CompiledModel,
    ConditioningPair,
    ProgressCallback,
    StartLevel,
)
from jaxdiff.pipeline.inputs import BatchInputs
from jaxdiff.pipeline.request import Request, Requests
from jaxdiff.pipeline.tiling import tiled
from jaxdiff.samplers.base import Sampler


class SamplingPlan(NamedTuple):
    """The sampling settings that all images of a call share."""

    requests: Requests
    grid: TimestepGrid  # one row for each image of the call
    start: StartLevel  # likewise
    rule: Guidance
    sampler: Sampler
    guidance_model: CompiledModel | None  # those of a weaker model
    decode: bool
    tile: int | None  # of the VAE, in pixels
    callback: ProgressCallback | None
    intermediate_steps: tuple[int, ...]  # steps whose latents are kept


class BatchOutput(NamedTuple):
    """The images of one batch."""

    images: NDArray  # images or latents
    watched: Float[NDArray, "b n 2 h w c"]  # in each watched step: x where it starts, and its D


class StageTimer:
    """Seconds by stage, those of compiling counted apart."""

    def __init__(self, stages: CompiledModel) -> None:
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


class BatchRunner:
    """Draws batches of images with the compiled stages of a model."""

    def __init__(
        self,
        stages: CompiledModel,
        *,
        vae_scale_factor: int,
        channels: int,
        uses_mask: bool,
        devices: int,
    ) -> None:
        self._stages = stages
        self._vae_scale_factor = vae_scale_factor
        self._channels = channels  # of latents
        self._uses_mask = uses_mask  # whether the network takes mask and masked image
        self._devices = devices

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """Height, width and channels of the latents of an image."""
        return (
            request.height // self._vae_scale_factor,
            request.width // self._vae_scale_factor,
            self._channels,
        )

    def run(
        self, inputs: BatchInputs, plan: SamplingPlan, size: int, timer: StageTimer
    ) -> BatchOutput:
        """One batch, padded to `size` and to the devices by repeating its last image."""
        count = len(inputs.guidance_scales.scale)
        size = -(-size // self._devices) * self._devices
        inputs = inputs.take(np.minimum(np.arange(size), count - 1))
        with timer("encode_s"):
            conditioning, latents, mask = self._encode_conditioning(inputs, plan)
        with timer("sample_s"):
            noise = inputs.noise
            if noise is None:
                noise = self._stages.noise(inputs.keys, self.latent_shape(plan.requests[0]))
            latents, seen = self._stages.denoise(
                noise,
                conditioning,
                inputs.guidance_scales,
                inputs.grid,
                inputs.keys,
                sampler=plan.sampler,
                rule=plan.rule,
                start=inputs.start,
                targets=inputs.targets,
                given=latents,
                mask=mask,
                callback=plan.callback,
                intermediate_steps=plan.intermediate_steps,
            )
        watched = np.asarray(seen, np.float32).reshape(len(seen), 2, *latents.shape)
        watched = np.moveaxis(watched, 2, 0)
        if not plan.decode:
            return BatchOutput(latents[:count], watched[:count])
        with timer("decode_s"):
            return BatchOutput(self.decode_latents(latents, plan.tile)[:count], watched[:count])

    def decode_latents(
        self, latents: Float[NDArray, "b h w c"], tile: int | None
    ) -> UInt8[NDArray, "b h2 w2 3"]:
        """Decode latents with the VAE, in tiles of `tile` pixels or as a whole."""
        decode, zoom, count = self._stages.decode, Fraction(self._vae_scale_factor), len(latents)
        padded = -(-count // self._devices) * self._devices
        latents = latents[np.minimum(np.arange(padded), count - 1)]
        if tile is None:
            return decode(latents)[:count]
        images = tiled(decode, latents, tile=tile // self._vae_scale_factor, cell=1, zoom=zoom)
        return np.round(images).astype(np.uint8)[:count]

    def _latents(self, images: NDArray, tile: int | None) -> Float[NDArray, "b h w c"]:
        """Encode images with the VAE, in tiles of `tile` pixels or as a whole."""
        encode, zoom = self._stages.latents, Fraction(1, self._vae_scale_factor)
        if tile is None:
            return encode(images)
        return tiled(encode, images, tile=tile, cell=self._vae_scale_factor, zoom=zoom)

    def _encode_conditioning(
        self, inputs: BatchInputs, plan: SamplingPlan
    ) -> tuple[ConditioningPair, NDArray | None, NDArray | None]:
        """The conditioning of the networks, the initial latents, and the mask of what changes.

        There is no such mask for a network that sees it itself.
        """
        latents, mask = inputs.latents, None
        if inputs.images is not None:
            latents = self._latents(inputs.images, plan.tile)
        if inputs.masks is not None and not self._uses_mask:
            mask = self._downsample(inputs.masks)
        request = plan.requests[0]

        def extras(network: str) -> ExtraInputs:
            streams = [s for s in plan.rule.streams if s.network == network]
            return ExtraInputs(
                size=(request.height, request.width),
                options=request.extras,
                prompted=tuple(stream.prompt_source == "prompt" for stream in streams),
                guidance_scales=np.asarray(inputs.guidance_scales.scale),
                image=inputs.images,
                mask=inputs.masks,
                encode=lambda images: self._latents(images, plan.tile),
                downsample=self._downsample,
            )

        skip = request.clip_skip
        conditioning = self._stages.encode(inputs.prompts, extras("main"), skip=skip)
        guide = None
        if inputs.guidance_model_prompts is not None and plan.guidance_model is not None:
            guide = plan.guidance_model.encode(
                inputs.guidance_model_prompts, extras("guidance_model"), skip=skip
            )
        return jax.block_until_ready(ConditioningPair(conditioning, guide)), latents, mask

    def _downsample(self, masks: Float[NDArray, "b h2 w2 1"]) -> Float[NDArray, "b h w 1"]:
        return image_inputs.downsample_mask(masks, self._vae_scale_factor)
