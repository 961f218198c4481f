"""`jaxdiff strip`: one generation step by step, from noise to the image."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from jaxdiff.checkpoints.model_options import COMPONENTS, NEEDS, ModelOptions
from jaxdiff.cli.arguments import parse
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.configs import check_needs
from jaxdiff.core.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Show one generation at several steps: the predicted image and the noisy latents."""

    prompt: tyro.conf.Positional[str]
    """The prompt."""
    show_steps: str | None = None
    """Steps to show, counted from 0, such as 0,2,5,10. Default: eight from first to last."""
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
    """Sampler; `jaxdiff generate --help` lists them, and the guidance rules."""
    timestep_spacing: str | None = None
    """Spacing of the timesteps."""
    seed: int = 0
    """Seed of the image."""
    output: pathlib.Path = pathlib.Path("strip.png")
    """The PNG file to write."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, generate, write. Raises InputError on bad input."""
    options = parse(Options, arguments, prog="jaxdiff strip")
    check_needs(options, NEEDS)
    shown = None if options.show_steps is None else _step_numbers(options.show_steps)
    check_file(options.output)  # before anything is generated
    import jaxdiff  # only now: bad arguments and --help need not wait for jax
    from jaxdiff.evaluation.strip import make_strip
    from jaxdiff.pipeline.load import one_model
    from jaxdiff.pipeline.request import check_options

    own = ("prompt", "show_steps", "model", "output", *COMPONENTS)
    call = {name: value for name, value in vars(options).items() if name not in own}
    check_options(call)
    pipe = one_model(jaxdiff.load(options.model, **options.components()))
    image = make_strip(pipe, options.prompt, shown, **call)
    with atomic_file(options.output) as temporary:
        image.save(temporary, format="PNG")
    print(options.output)


def _step_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"show_steps: got {text!r}, expected steps such as 0,2,5,10") from None
