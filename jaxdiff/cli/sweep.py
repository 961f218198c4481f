"""`jaxdiff sweep`: compare guidance scales, rules, samplers and steps by images and measures."""

import dataclasses
import pathlib
import shlex
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich import progress
from rich.console import Console

from jaxdiff.checkpoints import model_options
from jaxdiff.checkpoints.model_options import ModelOptions
from jaxdiff.cli.arguments import parse
from jaxdiff.core.atomic import check_file
from jaxdiff.core.configs import Need, check_needs
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import positive
from jaxdiff.experiments.procedural import EMBEDDED_DATA, procedural_dataset

PROMPTS = (
    "a small red circle above a large blue square",
    "a large yellow star on a pink background",
    "a small cyan ring left of a large black cross",
    "a large green triangle on a grey background",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Generate every prompt at every guidance scale from one seed, as one grid of images.

    Several rules, samplers, numbers of steps or scales of classifier or CLIP guidance give one row
    for each combination. Writes NAME.png, a table NAME.md, the numbers NAME.json and their plot
    NAME-plot.png. The same command resumes, also with more rows and columns: results in NAME.json
    are not computed again.
    """

    prompt: tyro.conf.Positional[tuple[str, ...]] = PROMPTS
    """Prompts, one row each."""
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
    """Guidance scales, one column each."""
    guidance: tuple[str, ...] = ()
    """Guidance rules, such as cfg or apg:eta=0+interval:lo=0.3,hi=5. Default: the model's own."""
    samplers: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--sampler"])] = ()
    """Samplers; `jaxdiff generate --help` lists them, and the rules. Default: the model's own."""
    steps: tuple[int, ...] = ()
    """Numbers of denoising steps. Default: the model's own."""
    negative_prompt: str | None = None
    """What the images should not show. --evaluate ignores it."""
    classifier_scales: Annotated[
        tuple[float, ...], tyro.conf.arg(aliases=["--classifier-scale"])
    ] = (0.0,)
    """Scales of classifier guidance."""
    clip_scales: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--clip-scale"])] = (0.0,)
    """Scales of CLIP guidance."""
    guidance_model: str | None = None
    """The weaker model of --guidance autoguidance: a folder, a file or a Hub repository."""
    mesh: str | None = None
    """Share weights and work between devices, such as fsdp=4,tensor=2 or guidance=2."""
    evaluate: bool = False
    """Also evaluate each combination and scale on the standard scene prompts, and print under each
    column in how many images everything is correct."""
    measure_speed: bool = False
    """Also measure the seconds per image. Nothing else should run at the same time."""
    prompt_stride: int = 1
    """Evaluate only every n-th prompt: faster, with larger errors."""
    seed: int = 0
    """Seed of the images, and of the first evaluated image."""
    output: pathlib.Path = pathlib.Path("sweep.png")
    """The PNG file to write."""


NEEDS = {**model_options.NEEDS, "prompt_stride": Need("evaluate")}


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, generate, evaluate, write. Raises InputError on bad input."""
    options = parse(Options, arguments, prog="jaxdiff sweep")
    check_needs(options, NEEDS)
    positive("prompt_stride", options.prompt_stride)
    if not options.prompt:
        raise InputError("prompt: got none, expected at least one")
    if options.output.suffix != ".png":
        raise InputError(f"output: got {options.output}, expected a file name that ends in .png")
    check_file(options.output)  # before any image is generated
    import jaxdiff  # only now: bad arguments and --help need not wait for jax
    from jaxdiff.evaluation.sweep import AxisValues, Sweep
    from jaxdiff.evaluation.sweep_results import Results
    from jaxdiff.generation.models import check_guidance_model
    from jaxdiff.pipeline.load import one_model

    names = [field.name for field in dataclasses.fields(AxisValues)]
    values = AxisValues(**{name: getattr(options, name) for name in names})
    pipe, weaker = (
        one_model(jaxdiff.load(options.model, mesh=options.mesh, **options.components())),
        None,
    )
    if options.guidance_model is not None:
        check_guidance_model(*(options.guidance or [pipe.defaults.guidance]))
        weaker = one_model(jaxdiff.load(options.guidance_model, mesh=options.mesh))
        pipe.set_guidance_model(weaker)
    judge = procedural_dataset(EMBEDDED_DATA) if options.evaluate else None
    if judge is not None:
        judge.check_model_size(pipe.defaults.height, pipe.defaults.width)
    axes = values.axes(pipe)
    sweep = Sweep(
        pipe=pipe,
        guidance_model=weaker,
        prompts=options.prompt,
        negative_prompt=options.negative_prompt,
        judge=judge,
        prompt_stride=options.prompt_stride,
        measure_speed=options.measure_speed,
        seed=options.seed,
    )
    results = Results.open(options.output.with_suffix(".json"), sweep.settings())
    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=len(axes.points))
        images = sweep.run(
            axes, results, lambda done, name: bar.update(task, completed=done, description=name)
        )
    command = f"python -m jaxdiff sweep {shlex.join(arguments)}"
    for path in sweep.write(options.output, axes, results, images, command):
        print(path)
