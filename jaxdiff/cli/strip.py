"""`jaxdiff strip`: one picture on its way from noise, step by step."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import tyro

from jaxdiff.cli.labelled import table
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.errors import InputError

COLUMNS = 8  # where no steps are named
LABELS = (
    "x0: the picture that the guided model predicts at this step",
    "x: the noisy latent that it sees, over sqrt(alpha^2 + sigma^2), decoded",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Draw what one generation holds at several steps: its prediction, and its noisy latents."""

    prompt: tyro.conf.Positional[str]
    """What to draw."""
    at: str | None = None
    """The steps to show, counted from 0, such as 0,2,5,10; left out: eight from first to last."""
    model: str | None = None
    """A diffusers folder, a checkpoint file or a Hub repository; left out: the embedded model."""
    negative_prompt: str | None = None
    """What to keep out of the picture."""
    guidance: str | None = None
    """The rule of guidance, such as apg:eta=0.2 or cfg+interval:lo=0.3,hi=5."""
    guidance_scale: float | None = None
    """Strength of the guidance."""
    classifier_scale: float | None = None
    """How far the model's classifier steers the picture towards the prompt."""
    steps: int | None = None
    """Denoising steps."""
    sampler: str | None = None
    """The rule of one step."""
    timesteps: str | None = None
    """Spacing of the steps."""
    seed: int = 0
    """Of the picture."""
    output: pathlib.Path = pathlib.Path("strip.png")
    """The PNG file to write."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, draw, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff strip")
    named = None if options.at is None else _numbers(options.at)
    check_file(options.output)  # before a picture is drawn for it
    import jaxdiff  # only now: bad arguments and --help need not wait for jax

    pipe = jaxdiff.load(options.model)
    left_out = ("prompt", "at", "model", "output")
    fields = (field.name for field in dataclasses.fields(options) if field.name not in left_out)
    choices = {name: getattr(options, name) for name in fields}
    request = pipe.resolve(options.prompt, **choices)
    if named is None:
        named = spread(request.steps, COLUMNS)
    seen = pipe(options.prompt, output="latent", watch=named, **choices).watched
    pictures = pipe.decode_latents(np.concatenate([seen.x0[:, 0], seen.unit_variance[:, 0]]))
    columns = len(seen.steps)
    rows = [list(pictures[:columns]), list(pictures[columns:])]
    with np.errstate(divide="ignore"):  # pure noise has ratio inf
        ratios = seen.sigma / seen.alpha
    heads = [
        f"step {step}\nnoise {ratio:.3g}" for step, ratio in zip(seen.steps, ratios, strict=True)
    ]
    title = (
        f"{options.prompt} ({request.guidance}, scale {request.guidance_scales[0]:g}, "
        f"{request.sampler}, {request.steps} steps, seed {options.seed}; "
        "noise = sigma / alpha)"
    )
    with atomic_file(options.output) as temporary:
        table(rows, LABELS, heads, title=title).save(temporary, format="PNG")
    print(options.output)


def spread(steps: int, count: int) -> list[int]:
    """Up to `count` steps from the first to the last, at even distances."""
    return sorted({round(i) for i in np.linspace(0, steps - 1, count)})


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"at: got {text!r}, expected steps such as 0,2,5,10") from None
