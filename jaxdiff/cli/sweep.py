"""`jaxdiff sweep`: pictures and measures of guidance, scales against rules, samplers and steps."""

import dataclasses
import itertools
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich import progress
from rich.console import Console

from jaxdiff.cli.evaluate import check_scenes, measure
from jaxdiff.cli.labelled import table
from jaxdiff.cli.sweep_plot import plot
from jaxdiff.cli.sweep_results import (
    PICTURES,
    TIMES,
    Cell,
    Combination,
    Results,
    feet,
    table_of,
    write_table,
)
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray, UInt8
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.scenes.report import chroma, clipped, contrast, standard_prompts
from jaxdiff.scenes.source import Prompt

PROMPTS = (
    "a small red circle above a large blue square",
    "a large yellow star on a pink background",
    "a small cyan ring left of a large black cross",
    "a large green triangle on a grey background",
)
MEASURED = 64  # drawn at once to be measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Draw every prompt at every guidance scale, from one seed, into one picture.

    Several rules, samplers, numbers of steps or steering scales give rows for every combination.
    NAME.png comes with a table NAME.md, the numbers NAME.json and their plot NAME-plot.png. The
    same command goes on where it was stopped, with more rows and columns too: what NAME.json has is
    not measured again.
    """

    prompt: tyro.conf.Positional[tuple[str, ...]] = PROMPTS
    """The rows."""
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
    """The columns."""
    guidance: tuple[str, ...] = ()
    """Rules such as cfg or apg:eta=0+interval:lo=0.3,hi=5; left out: the model's own."""
    samplers: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--sampler"])] = ()
    """Rules of one step; left out: the model's own."""
    steps: tuple[int, ...] = ()
    """Numbers of denoising steps; left out: the model's own."""
    negative_prompt: str | None = None
    """What to keep out of the pictures; not of those that are measured."""
    classifier_scales: Annotated[
        tuple[float, ...], tyro.conf.arg(aliases=["--classifier-scale"])
    ] = (0.0,)
    """How far the model's classifier steers pictures towards their prompts."""
    clip_scales: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--clip-scale"])] = (0.0,)
    """How far the model's CLIP does."""
    model: str | None = None
    """A diffusers folder; the embedded model when left out."""
    guide: str | None = None
    """A weaker model of the same kind, for --guidance auto."""
    measured: bool = False
    """Judge pictures of the standard scene prompts in every cell, and print under each scale how
    many come out all right."""
    timed: bool = False
    """Take the seconds that a picture takes in every cell. Nothing else should run meanwhile."""
    every: int = 1
    """Measure only each n-th prompt: faster and less certain."""
    seed: int = 0
    """Of every picture; of the first that is measured."""
    output: pathlib.Path = pathlib.Path("sweep.png")
    """The PNG file to write."""


class Axes(NamedTuple):
    """What is combined."""

    combinations: list[Combination]
    scales: tuple[float, ...]


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, draw, measure, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff sweep")
    prompts = standard_prompts()[:: positive("every", options.every)]
    for name in ("scales", "prompt", "classifier_scales", "clip_scales"):
        if not getattr(options, name):
            raise InputError(f"{name}: got none, expected at least one")
    if options.output.suffix != ".png":
        raise InputError(f"output: got {options.output}, expected a name that ends in .png")
    check_file(options.output)  # before pictures are drawn for it
    import jaxdiff  # only now: bad arguments and --help need not wait for jax

    pipe = jaxdiff.load(options.model)
    guide = None if options.guide is None else jaxdiff.load(options.guide)
    if guide is not None:
        pipe.set_guide(guide)
    if options.measured:
        check_scenes(pipe)
    axes = _axes(options, pipe)
    settings = _settings(options, pipe, guide)
    results = Results.open(options.output.with_suffix(".json"), settings)
    images = _fill(results, pipe, options, axes, prompts if options.measured else [])
    _write(options, axes, results, images, f"python -m jaxdiff sweep {shlex.join(arguments)}")


def _axes(options: Options, pipe: Any) -> Axes:
    """The axes with the model's own choices filled in; InputError for what can never be drawn."""
    from jaxdiff.guidance.registry import parse
    from jaxdiff.pipeline.request import MAX_SCALE, MAX_STEPS
    from jaxdiff.samplers.registry import SAMPLERS

    own = pipe.defaults
    rules = options.guidance or (own.guidance,)
    samplers, steps = options.samplers or (own.sampler,), options.steps or (own.steps,)
    for rule in rules:
        parse(rule)
    for sampler in samplers:
        one_of("samplers", sampler, SAMPLERS)
    for number in steps:
        in_range("steps", number, 1, MAX_STEPS)
    for name in ("scales", "classifier_scales", "clip_scales"):
        for scale in getattr(options, name):
            in_range(name, scale, 0, MAX_SCALE)
    unique = dict.fromkeys  # in their order
    axes = map(unique, (rules, samplers, steps, options.classifier_scales, options.clip_scales))
    kinds = itertools.product(*axes)
    return Axes([*map(Combination._make, kinds)], tuple(unique(options.scales)))


def _settings(options: Options, pipe: Any, guide: Any) -> dict[str, Any]:
    """Everything that the result of a cell depends on beside the cell, as JSON values."""
    names = ("measured", "timed", "every", "seed")
    return {
        "model": pipe.name,
        "weights": pipe.fingerprint,
        "guide": None if guide is None else f"{guide.name} {guide.fingerprint}",
        "device": pipe.device_name,  # seconds on another one are not comparable
        **{name: getattr(options, name) for name in names},
        "prompt": list(options.prompt),
        "negative_prompt": options.negative_prompt,
    }


def _fill(
    results: Results, pipe: Any, options: Options, axes: Axes, prompts: Sequence[Prompt]
) -> dict[Cell, UInt8[NDArray, "n h w 3"]]:
    """The pictures of all cells; measures those that `results` has not.

    InputError where the model refuses them all.
    """
    images: dict[Cell, NDArray] = {}
    cells = [Cell(c, scale) for c in axes.combinations for scale in axes.scales]
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
        task = bar.add_task("", total=len(cells))
        for cell in cells:
            now = cell.combination.label(axes.combinations).replace("\n", " ")
            bar.update(task, description=f"{now} {cell.scale:g}")
            try:
                images[cell], result = _draw(pipe, options, cell)
            except InputError as error:
                result = {"refused": str(error)}
            if cell not in results.cells:
                if prompts and cell in images:
                    result |= _judge(pipe, options, cell, prompts)
                results.add(cell, result)
            bar.advance(task)
    if not images:
        raise InputError(results.cells[cells[0]]["refused"])
    return images


def _choices(cell: Cell) -> dict[str, Any]:
    """What a call of the pipeline is told."""
    guidance, sampler, steps, classifier, clip = cell.combination
    return {
        "guidance": guidance,
        "sampler": sampler,
        "steps": steps,
        "guidance_scale": cell.scale,
        "classifier_scale": classifier or None,
        "clip_scale": clip or None,
    }


def _draw(
    pipe: Any, options: Options, cell: Cell
) -> tuple[UInt8[NDArray, "n h w 3"], dict[str, Any]]:
    """A cell's pictures of the prompts, and what they tell; InputError if the model refuses."""
    prompts, choices = list(options.prompt), _choices(cell)
    choices["negative_prompt"] = options.negative_prompt
    request = pipe.resolve(prompts, seed=[options.seed] * len(prompts), **choices)
    size = min(PICTURES, len(prompts))
    call = {"output": "numpy", "batch_size": size, **choices}
    images = np.asarray(pipe(prompts, seed=list(request.seeds), **call).images)
    result = {
        "evaluations": pipe.nfe(request),
        "measures": {f.__name__: f(images) for f in (chroma, clipped, contrast)},
        "shares": {},
    }
    if options.timed:
        filled = [prompts[i % len(prompts)] for i in range(PICTURES)]
        call |= {"seed": list(range(PICTURES)), "batch_size": PICTURES}
        runs = [pipe(filled, **call).timings for _ in range(1 + TIMES)][1:]  # the first compiles
        result["seconds"] = min(t["total_s"] - t["compile_s"] for t in runs) / PICTURES
    return images, result


def _judge(pipe: Any, options: Options, cell: Cell, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What pictures of the standard prompts tell of a cell."""
    call = {"seed": options.seed, "batch_size": min(MEASURED, len(prompts))}
    report = measure(pipe, prompts, **call, **_choices(cell))
    shares = {
        name: {"value": share.value, "count": share.count, "error": share.error}
        for name, share in report.shares.items()
    }
    return {"measures": dict(report.measures), "shares": shares}


def _write(
    options: Options,
    axes: Axes,
    results: Results,
    images: Mapping[Cell, UInt8[NDArray, "n h w 3"]],
    command: str,
) -> None:
    """The picture, the table and the plot; prints their names."""
    output, several = options.output, len(options.prompt) > 1
    rows: list[list[NDArray | None]] = []
    labels = []
    for combination in axes.combinations:
        cells = [images.get(Cell(combination, scale)) for scale in axes.scales]
        for number, prompt in enumerate(options.prompt):
            rows.append([None if found is None else found[number] for found in cells])
            name = combination.label(axes.combinations)
            texts = [name, prompt if several or not name else ""]
            labels.append("\n".join(text for text in texts if text))
    heads = [f"scale {scale:g}" for scale in axes.scales]
    below = [feet(results, c, axes.scales) for c in axes.combinations] if options.measured else []
    with atomic_file(output) as temporary:
        table(rows, labels, heads, below).save(temporary, format="PNG")
    print(output)
    print(results.path)
    text = table_of(results, axes.combinations, axes.scales, command)
    write_table(output.with_suffix(".md"), text)
    chart = output.with_name(f"{output.stem}-plot.png")
    with atomic_file(chart) as temporary:
        plot(results, axes.combinations, axes.scales, temporary)
    print(chart)
