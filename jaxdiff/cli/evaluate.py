"""`jaxdiff evaluate`: how well a model of scenes follows its prompts."""

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
from jaxdiff.scenes.report import CIRCLES, Report, alignment, renders, standard_prompts
from jaxdiff.scenes.source import MAX_SIZE, Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Draw the standard prompts, none of which was trained on, and judge the pictures."""

    model: str | None = None
    """A diffusers folder; the embedded model when left out; "renders" for perfect drawings."""
    guidance_scale: float | None = None
    """Strength of the guidance; the model's default when left out."""
    guidance: str | None = None
    """The rule of guidance, such as apg or cfg+rescale:phi=0.7."""
    classifier_scale: float | None = None
    """How far the model's classifier/ steers the pictures."""
    steps: int | None = None
    """Denoising steps."""
    sampler: str | None = None
    """The rule of one step."""
    timesteps: str | None = None
    """Spacing of the steps."""
    seed: int = 0
    """Of the first picture."""
    batch_size: int = 64
    """Pictures drawn at once."""
    every: int = 1
    """Take only each n-th prompt: faster and less certain."""
    output: pathlib.Path | None = None
    """A file for the report as JSON."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, draw, judge, print the table. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff evaluate")
    prompts = standard_prompts()[:: positive("every", options.every)]
    circles = -(-CIRCLES // options.every)
    if options.output is not None:
        check_file(options.output)  # before pictures are drawn for it
    if options.model == "renders":
        report = alignment(renders(prompts), prompts, seed=options.seed, circles=circles)
    else:
        import jaxdiff  # only now: bad arguments and --help need not wait for jax

        names = ("guidance_scale", "guidance", "classifier_scale", "steps", "sampler", "timesteps")
        choices = {name: getattr(options, name) for name in names}
        pipe = jaxdiff.load(options.model)
        report = measure(
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


def measure(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    batch_size: int = 64,
    circles: int = 0,
    **choices: Any,
) -> Report:
    """The report on `pipe`, called with `choices` (guidance_scale, steps, ...)."""
    check_scenes(pipe)

    def generate(texts: list[str], seeds: list[int]) -> UInt8[NDArray, "n h w 3"]:
        call = {"seed": seeds, "batch_size": batch_size, "output": "numpy"}
        return np.asarray(pipe(texts, **call, **choices).images)

    return alignment(generate, prompts, seed=seed, batch_size=batch_size, circles=circles)


def check_scenes(pipe: Any) -> None:
    """InputError for a model whose pictures are not squares of a size that scenes have."""
    height, width = pipe.defaults.height, pipe.defaults.width
    if height != width or not CANVAS <= height <= MAX_SIZE:
        raise InputError(
            f"model: got pictures of {height} x {width}, expected scenes: squares with sides of "
            f"{CANVAS} to {MAX_SIZE}"
        )
