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
from jaxdiff.scenes.rendering import CANVAS
from jaxdiff.scenes.report import (
    NUM_CIRCLES,
    Report,
    evaluate_alignment,
    render_generator,
    standard_prompts,
)
from jaxdiff.scenes.source import MAX_SIZE, ScenePrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Generate images of standard scene prompts that were not trained on, and score them."""

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
    output: pathlib.Path | None = None
    """Also write the report to this JSON file."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, generate, score, print the table. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff evaluate")
    prompts = standard_prompts()[:: positive("prompt_stride", options.prompt_stride)]
    circles = -(-NUM_CIRCLES // options.prompt_stride)
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
