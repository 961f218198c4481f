"""`jaxdiff evaluate`: how well a scene model follows its prompts."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro

from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray, UInt8
from jaxdiff.core.validate import positive
from jaxdiff.scenes.captions import parse_caption
from jaxdiff.scenes.rendering import CANVAS
from jaxdiff.scenes.report import (
    NUM_CIRCLES,
    Report,
    evaluate_alignment,
    render_generator,
    standard_prompts,
)
from jaxdiff.scenes.source import MAX_SIZE, ScenePrompt

NUM_SEEDS = 100  # images of --prompt if --num-images is left out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Generate images of standard scene prompts that were not trained on, and score them.

    With --prompt: images of that prompt from consecutive seeds.
    """

    model: str | None = None
    """A diffusers folder, or "renders" for exact renderings. Default: the embedded model."""
    guidance_scale: float | None = None
    """Guidance scale. Default: the model's own."""
    guidance: str | None = None
    """Guidance rule, such as apg or cfg+rescale:phi=0.7."""
    classifier_scale: float | None = None
    """Scale of classifier guidance."""
    steps: int | None = None
    """Number of denoising steps."""
    sampler: str | None = None
    """Sampler."""
    timestep_spacing: str | None = None
    """Spacing of the timesteps."""
    seed: int = 0
    """Seed of the first image."""
    batch_size: int = 64
    """Images per batch."""
    prompt_stride: int = 1
    """Use only every n-th prompt: faster, with larger errors."""
    prompt: str | None = None
    """Use this caption of a scene instead of the standard prompts."""
    num_images: int | None = None
    """Number of images of --prompt, with consecutive seeds. Default: 100."""
    output: pathlib.Path | None = None
    """Also write the report to this JSON file."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, generate, score, print the table. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff evaluate")
    prompts, circles = _prompts(options)
    if options.output is not None:
        check_file(options.output)  # before any image is generated
    if options.model == "renders":
        report = evaluate_alignment(
            render_generator(prompts), prompts, seed=options.seed, circles=circles
        )
    else:
        import jaxdiff  # only now: bad arguments and --help need not wait for jax

        names = (
            "guidance_scale",
            "guidance",
            "classifier_scale",
            "steps",
            "sampler",
            "timestep_spacing",
        )
        choices = {name: getattr(options, name) for name in names}
        pipe = jaxdiff.load(options.model)
        report = evaluate_model(
            pipe,
            prompts,
            seed=options.seed,
            batch_size=options.batch_size,
            circles=circles,
            **choices,
        )
    print(report.table())
    if options.output is not None:
        with atomic_file(options.output) as temporary:
            temporary.write_text(json.dumps(report.to_mapping(), indent=2) + "\n")


def _prompts(options: Options) -> tuple[list[ScenePrompt], int]:
    """The prompts to generate, and the number of additional images of circles."""
    stride = positive("prompt_stride", options.prompt_stride)
    if options.prompt is None:
        if options.num_images is not None:
            raise InputError(f"num_images: got {options.num_images}, expected a prompt beside it")
        return standard_prompts()[::stride], -(-NUM_CIRCLES // stride)
    if stride != 1:
        raise InputError(f"prompt_stride: got {stride} beside a prompt, expected it left out")
    prompt = ScenePrompt(text=options.prompt, scene=parse_caption(options.prompt))
    count = NUM_SEEDS if options.num_images is None else positive("num_images", options.num_images)
    return [prompt] * count, 0


def evaluate_model(
    pipe: Any,
    prompts: Sequence[ScenePrompt],
    *,
    seed: int = 0,
    batch_size: int = 64,
    circles: int = 0,
    **options: Any,
) -> Report:
    """The report on `pipe`, called with `options` (guidance_scale, steps, ...)."""
    check_scene_size(pipe)

    def generate(texts: list[str], seeds: list[int]) -> UInt8[NDArray, "n h w 3"]:
        call = {"seed": seeds, "batch_size": batch_size, "output": "numpy"}
        return np.asarray(pipe(texts, **call, **options).images)

    return evaluate_alignment(generate, prompts, seed=seed, batch_size=batch_size, circles=circles)


def check_scene_size(pipe: Any) -> None:
    """InputError unless the model generates squares of a size that scenes have."""
    height, width = pipe.defaults.height, pipe.defaults.width
    if height != width or not CANVAS <= height <= MAX_SIZE:
        raise InputError(
            f"model: got a default size of {height} x {width}, expected a scene model: squares of "
            f"{CANVAS} to {MAX_SIZE} pixels"
        )
