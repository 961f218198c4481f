"""`jaxdiff strip`: one generation step by step, from noise to the image."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import tyro

from jaxdiff.cli.image_grid import labelled_grid
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.errors import InputError

COLUMNS = 8  # by default
ROW_LABELS = (
    "x0: the image that the guided model predicts at this step",
    "x: the noisy latent that it predicts from, over sqrt(alpha^2 + sigma^2), decoded",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Show one generation at several steps: the predicted image and the noisy latents."""

    prompt: tyro.conf.Positional[str]
    """The prompt."""
    show_steps: str | None = None
    """Steps to show, counted from 0, such as 0,2,5,10. Default: eight from first to last."""
    model: str | None = None
    """A diffusers folder, a checkpoint file or a Hub repository. Default: the embedded model."""
    negative_prompt: str | None = None
    """What the image should not show."""
    guidance: str | None = None
    """Guidance rule, such as apg:eta=0.2 or cfg+interval:lo=0.3,hi=5."""
    guidance_scale: float | None = None
    """Guidance scale."""
    classifier_scale: float | None = None
    """Scale of classifier guidance."""
    steps: int | None = None
    """Number of denoising steps."""
    sampler: str | None = None
    """Sampler."""
    timestep_spacing: str | None = None
    """Spacing of the timesteps."""
    seed: int = 0
    """Seed of the image."""
    output: pathlib.Path = pathlib.Path("strip.png")
    """The PNG file to write."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, generate, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff strip")
    shown = None if options.show_steps is None else _step_numbers(options.show_steps)
    check_file(options.output)  # before anything is generated
    import jaxdiff  # only now: bad arguments and --help need not wait for jax

    pipe = jaxdiff.load(options.model)
    own = ("prompt", "show_steps", "model", "output")
    fields = (field.name for field in dataclasses.fields(options) if field.name not in own)
    choices = {name: getattr(options, name) for name in fields}
    request = pipe.resolve(options.prompt, **choices)
    if shown is None:
        shown = evenly_spaced(request.steps, COLUMNS)
    out = pipe(options.prompt, output="latent", intermediate_steps=shown, **choices)
    seen = out.intermediates
    images = pipe.decode_latents(np.concatenate([seen.x0[:, 0], seen.unit_variance[:, 0]]))
    columns = len(seen.steps)
    rows = [list(images[:columns]), list(images[columns:])]
    with np.errstate(divide="ignore"):  # of pure noise: inf
        ratios = seen.sigma / seen.alpha
    column_labels = [
        f"step {step}\nnoise {ratio:.3g}" for step, ratio in zip(seen.steps, ratios, strict=True)
    ]
    title = (
        f"{options.prompt} ({request.guidance}, scale {request.guidance_scales[0]:g}, "
        f"{request.sampler}, {request.steps} steps, seed {options.seed}; "
        "noise = sigma / alpha)"
    )
    with atomic_file(options.output) as temporary:
        labelled_grid(rows, ROW_LABELS, column_labels, title=title).save(temporary, format="PNG")
    print(options.output)


def evenly_spaced(steps: int, count: int) -> list[int]:
    """Up to `count` evenly spaced steps, from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, steps - 1, count)})


def _step_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"show_steps: got {text!r}, expected steps such as 0,2,5,10") from None
