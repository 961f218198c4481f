"""`Pipeline`: a model in memory that turns prompts into pictures."""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from PIL import Image

from jaxdiff.checkpoints.pipelines import PipelineParts, write_pipeline
from jaxdiff.checkpoints.tokenizers import TokenizerFiles, write_tokenizer
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, NDArray
from jaxdiff.core.validate import one_of, positive, shape
from jaxdiff.data.tokenizer import load_tokenizer, tokenize, truncated
from jaxdiff.diffusion.predictions import KINDS
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.diffusion.timesteps import Grid, GridOptions
from jaxdiff.guidance.rules import rule_for
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.pipeline.request import Defaults, Request, resolve, size_of
from jaxdiff.pipeline.stages import Report, Stages
from jaxdiff.samplers.noise import image_keys
from jaxdiff.samplers.registry import make_grid

OUTPUTS = ("pil", "numpy", "latent")
CLASSES = ("StableDiffusionPipeline",)
NEEDED = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
Noise = Float[NDArray, "b h w c"] | Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The pictures in the asked form, the request that made them, and where the seconds went."""

    images: Any  # list of PIL images, uint8 (b, H, W, 3), or scaled float32 latents (b, h, w, c)
    request: Request
    timings: dict[str, float]  # compile_s, encode_s, sample_s, decode_s, total_s


class Pipeline:
    """A text-to-image model; `jaxdiff.load` makes one from a folder.

    `unet`, `vae` and `text_encoder` are modules that can be called by themselves; calling the
    pipeline runs them compiled on all of its devices.
    """

    def __init__(self, parts: PipelineParts, *, name: str, devices: Sequence[jax.Device]) -> None:
        _check(parts, name)
        modules = {key: part.module for key, part in parts.components.items()}
        self.parts = parts
        self.name = name
        self.devices = tuple(devices)
        self.unet = cast(UNet2DConditionModel, modules["unet"])
        self.vae = cast(AutoencoderKL, modules["vae"])
        self.text_encoder = cast(CLIPTextModel, modules["text_encoder"])
        self.tokenizer = _tokenizer(parts.tokenizers["tokenizer"])
        self.schedule = NoiseSchedule.from_config(parts.scheduler)
        self.grid_options = GridOptions.from_config(parts.scheduler)
        self.prediction_type = one_of(
            "scheduler_config.json: prediction_type",
            parts.scheduler.get("prediction_type", "epsilon"),
            KINDS,
        )
        native = size_of(self.unet.config.sample_size, self.vae.config.downscale)
        self.defaults = Defaults.of(parts.defaults, parts.scheduler, native, source=name)
        self.stages = Stages(
            self.text_encoder, self.unet, self.vae, kind=self.prediction_type, devices=self.devices
        )

    @property
    def device_name(self) -> str:
        """The devices in words, such as "4 x TPU v5 lite"."""
        return f"{len(self.devices)} x {self.devices[0].device_kind}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short text that another training, or another dtype, of the same networks changes."""
        # Every training moves the last layer of the UNet; to read all of them would take long.
        last = np.asarray(self.unet.conv_out.kernel[...])
        return hashlib.sha256(last.tobytes()).hexdigest()[:12]

    def resolve(self, prompt: str | Sequence[str], **options: Any) -> Request:
        """The complete request that a call with these arguments would run; raises InputError."""
        return resolve(self.defaults, prompt, pixels_per_cell=self.vae.config.downscale, **options)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        timesteps: str | None = None,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        latents: Noise | None = None,
        batch_size: int | None = None,
        output: str = "pil",
        report: Report | None = None,
    ) -> Output:
        """Draw one picture per prompt, or per seed or scale where there is a single prompt.

        What is None takes the model's default. An integer seed s gives image i the seed s + i.
        `latents` is unit-variance start noise and replaces the seed's. `batch_size` is how many
        pictures are drawn at once (all by default); a smaller last batch is padded to it.
        `report(done, steps)` hears of the loop's progress. Raises InputError.
        """
        one_of("output", output, OUTPUTS)
        request = self.resolve(
            prompt,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            steps=steps,
            sampler=sampler,
            timesteps=timesteps,
            seed=seed,
            height=height,
            width=width,
        )
        grid = self._grid(request)
        noise = None if latents is None else self._own_noise(latents, request)
        count = len(request.prompts)
        size = count if batch_size is None else positive("batch_size", batch_size)
        clock = _Clock(self.stages)
        batches = [
            self._draw(
                request.part(first, size),
                grid,
                None if noise is None else noise[first : first + size],
                size,
                decode=output != "latent",
                clock=clock,
                report=report,
            )
            for first in range(0, count, size)
        ]
        images = np.concatenate(batches)
        return Output(
            images=[Image.fromarray(image) for image in images] if output == "pil" else images,
            request=request,
            timings=clock.timings(),
        )

    def save(self, folder: str | pathlib.Path) -> None:
        """Write a diffusers folder that PyTorch loads; weights keep their dtype."""
        write_pipeline(folder, self.parts)

    def _grid(self, request: Request) -> Grid:
        return make_grid(
            self.schedule,
            request.sampler,
            request.steps,
            kind=self.prediction_type,
            spacing=request.timesteps,
            options=self.grid_options,
        )

    def _latent_shape(self, request: Request) -> tuple[int, int, int]:
        cell = self.vae.config.downscale
        return request.height // cell, request.width // cell, self.vae.config.latent_channels

    def _own_noise(self, latents: Noise, request: Request) -> Noise:
        return shape("latents", latents, (len(request.prompts), *self._latent_shape(request)))

    def _tokens(self, texts: Sequence[str]) -> NDArray:
        for text, cut in zip(texts, truncated(self.tokenizer, texts), strict=True):
            if cut:
                limit = self.tokenizer.model_max_length
                warnings.warn(
                    f"prompt: {cut} tokens beyond {limit} are cut from {text[:60]!r}...",
                    stacklevel=4,
                )
        return tokenize(self.tokenizer, texts)

    def _draw(
        self,
        request: Request,
        grid: Grid,
        noise: Noise | None,
        size: int,
        *,
        decode: bool,
        clock: "_Clock",
        report: Report | None,
    ) -> NDArray:
        """One batch, padded to `size` and to the devices by repeating its last image."""
        count = len(request.prompts)
        size = -(-size // len(self.devices)) * len(self.devices)
        rows = np.minimum(np.arange(size), count - 1)
        rule = rule_for(request.guidance_scales)
        streams = (request.negative_prompts, request.prompts)[-rule.streams :]
        with clock("encode_s"):
            ids = np.stack([self._tokens(texts) for texts in streams], axis=1)[rows]
            context = jax.block_until_ready(self.stages.encode(ids))
        with clock("sample_s"):
            keys = image_keys(request.seeds)[rows]
            if noise is None:
                start = self.stages.noise(keys, self._latent_shape(request))
            else:
                start = np.asarray(noise, np.float32)[rows]
            scales = np.asarray(request.guidance_scales, np.float32)[rows]
            latents = self.stages.denoise(
                start,
                context,
                scales,
                grid,
                keys,
                sampler=request.sampler,
                rule=rule,
                report=report,
            )
        if not decode:
            return latents[:count]
        with clock("decode_s"):
            return self.stages.decode(latents)[:count]


class _Clock:
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


def _tokenizer(files: TokenizerFiles) -> Any:
    """The tokenizer that reads `files`."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder, files)
        return load_tokenizer(folder)


def _check(parts: PipelineParts, name: str) -> None:
    """InputError unless `parts` make a pipeline that this class can run."""
    one_of(f"{name}: pipeline class", parts.class_name, CLASSES)
    for key, cls in NEEDED.items():
        module = parts.components[key].module if key in parts.components else None
        if not isinstance(module, cls):
            got = "none" if module is None else type(module).__name__
            raise InputError(f"{name}: {key}: got {got}, expected {cls.__name__}")
    if "tokenizer" not in parts.tokenizers:
        raise InputError(f"{name}: tokenizer: got none, expected CLIPTokenizer")
