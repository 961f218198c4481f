"""`jaxdiff sweep`: compare guidance scales, rules, samplers and steps by images and measures."""

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

from jaxdiff.cli.evaluate import check_scene_size, evaluate_model
from jaxdiff.cli.image_grid import labelled_grid
from jaxdiff.cli.sweep_plot import plot
from jaxdiff.cli.sweep_results import (
    TIMING_BATCH,
    TIMING_RUNS,
    Combination,
    Results,
    SweepPoint,
    column_summary,
    markdown_table,
    write_table,
)
from jaxdiff.core.aliases import rename_guidance
from jaxdiff.core.atomic import atomic_file, check_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray, UInt8
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.scenes.report import chroma, clipped_fraction, contrast, standard_prompts
from jaxdiff.scenes.source import ScenePrompt

PROMPTS = (
    "a small red circle above a large blue square",
    "a large yellow star on a pink background",
    "a small cyan ring left of a large black cross",
    "a large green triangle on a grey background",
)
EVALUATION_BATCH = 64
# The names of these measures are stored in result files.
MEASURES = {"chroma": chroma, "clipped": clipped_fraction, "contrast": contrast}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
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
    """Samplers. Default: the model's own."""
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
    model: str | None = None
    """A diffusers folder. Default: the embedded model."""
    guidance_model: str | None = None
    """The weaker model of --guidance autoguidance: a folder, a file or a Hub repository."""
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


class Axes(NamedTuple):
    """The rows and columns of the grid."""

    combinations: list[Combination]
    scales: tuple[float, ...]


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, generate, evaluate, write. Raises InputError on bad input."""
    options = tyro.cli(Options, args=arguments, prog="jaxdiff sweep")
    prompts = standard_prompts()[:: positive("prompt_stride", options.prompt_stride)]
    for name in ("scales", "prompt", "classifier_scales", "clip_scales"):
        if not getattr(options, name):
            raise InputError(f"{name}: got none, expected at least one")
    if options.output.suffix != ".png":
        raise InputError(f"output: got {options.output}, expected a file name that ends in .png")
    check_file(options.output)  # before any image is generated
    import jaxdiff  # only now: bad arguments and --help need not wait for jax

    pipe = jaxdiff.load(options.model)
    weaker = None if options.guidance_model is None else jaxdiff.load(options.guidance_model)
    if weaker is not None:
        pipe.set_guidance_model(weaker)
    if options.evaluate:
        check_scene_size(pipe)
    axes = _axes(options, pipe)
    settings = _settings(options, pipe, weaker)
    results = Results.open(options.output.with_suffix(".json"), settings)
    images = _run_points(results, pipe, options, axes, prompts if options.evaluate else [])
    _write(options, axes, results, images, f"python -m jaxdiff sweep {shlex.join(arguments)}")


def _axes(options: Options, pipe: Any) -> Axes:
    """The axes with the model's defaults filled in; InputError for values out of range."""
    from jaxdiff.guidance.registry import parse
    from jaxdiff.pipeline.request import MAX_SCALE, MAX_STEPS
    from jaxdiff.samplers.registry import SAMPLERS

    own = pipe.defaults
    rules = [rename_guidance(rule) for rule in options.guidance or (own.guidance,)]
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
    unique = dict.fromkeys  # keeps the order
    axes = map(unique, (rules, samplers, steps, options.classifier_scales, options.clip_scales))
    kinds = itertools.product(*axes)
    return Axes([*map(Combination._make, kinds)], tuple(unique(options.scales)))


def _settings(options: Options, pipe: Any, weaker: Any) -> dict[str, Any]:
    """Everything besides the point that its result depends on, as JSON values."""
    names = ("evaluate", "measure_speed", "prompt_stride", "seed")
    return {
        "model": pipe.name,
        "weights": pipe.fingerprint,
        "guidance_model": None if weaker is None else f"{weaker.name} {weaker.fingerprint}",
        "device": pipe.device_name,  # seconds of other devices are not comparable
        **{name: getattr(options, name) for name in names},
        "prompt": list(options.prompt),
        "negative_prompt": options.negative_prompt,
    }


def _run_points(
    results: Results, pipe: Any, options: Options, axes: Axes, prompts: Sequence[ScenePrompt]
) -> dict[SweepPoint, UInt8[NDArray, "n h w 3"]]:
    """The images of all points; adds missing results to `results`.

    InputError if the model supports none of the points.
    """
    images: dict[SweepPoint, NDArray] = {}
    points = [SweepPoint(c, scale) for c in axes.combinations for scale in axes.scales]
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
        task = bar.add_task("", total=len(points))
        for point in points:
            now = point.combination.label(axes.combinations).replace("\n", " ")
            bar.update(task, description=f"{now} {point.scale:g}")
            try:
                images[point], result = _generate(pipe, options, point)
            except InputError as error:
                result = {"refused": str(error)}
            if point not in results.points:
                if prompts and point in images:
                    result |= _evaluate(pipe, options, point, prompts)
                results.add(point, result)
            bar.advance(task)
    if not images:
        raise InputError(results.points[points[0]]["refused"])
    return images


def _call_options(point: SweepPoint) -> dict[str, Any]:
    """The pipeline's options at a point."""
    guidance, sampler, steps, classifier, clip = point.combination
    return {
        "guidance": guidance,
        "sampler": sampler,
        "steps": steps,
        "guidance_scale": point.scale,
        "classifier_scale": classifier or None,
        "clip_scale": clip or None,
    }


def _generate(
    pipe: Any, options: Options, point: SweepPoint
) -> tuple[UInt8[NDArray, "n h w 3"], dict[str, Any]]:
    """The images of a point and its result; InputError if the model does not support it."""
    prompts, choices = list(options.prompt), _call_options(point)
    choices["negative_prompt"] = options.negative_prompt
    request = pipe.resolve(prompts, seed=[options.seed] * len(prompts), **choices)
    size = min(TIMING_BATCH, len(prompts))
    call = {"output": "numpy", "batch_size": size, **choices}
    images = np.asarray(pipe(prompts, seed=list(request.seeds), **call).images)
    result = {
        "evaluations": pipe.nfe(request),
        "measures": {name: measure(images) for name, measure in MEASURES.items()},
        "accuracies": {},
    }
    if options.measure_speed:
        repeated = [prompts[i % len(prompts)] for i in range(TIMING_BATCH)]
        call |= {"seed": list(range(TIMING_BATCH)), "batch_size": TIMING_BATCH}
        runs = [pipe(repeated, **call).timings for _ in range(1 + TIMING_RUNS)]
        runs = runs[1:]  # the first compiles
        result["seconds"] = min(t["total_s"] - t["compile_s"] for t in runs) / TIMING_BATCH
    return images, result


def _evaluate(
    pipe: Any, options: Options, point: SweepPoint, prompts: Sequence[ScenePrompt]
) -> dict[str, Any]:
    """The accuracies and measures of a point on the standard prompts."""
    call = {"seed": options.seed, "batch_size": min(EVALUATION_BATCH, len(prompts))}
    report = evaluate_model(pipe, prompts, **call, **_call_options(point))
    accuracies = {
        name: {"value": each.value, "count": each.count, "error": each.error}
        for name, each in report.accuracies.items()
    }
    return {"measures": dict(report.measures), "accuracies": accuracies}


def _write(
    options: Options,
    axes: Axes,
    results: Results,
    images: Mapping[SweepPoint, UInt8[NDArray, "n h w 3"]],
    command: str,
) -> None:
    """Write the grid, the table and the plot; prints their names."""
    output, several = options.output, len(options.prompt) > 1
    rows: list[list[NDArray | None]] = []
    row_labels = []
    for combination in axes.combinations:
        column = [images.get(SweepPoint(combination, scale)) for scale in axes.scales]
        for number, prompt in enumerate(options.prompt):
            rows.append([None if found is None else found[number] for found in column])
            name = combination.label(axes.combinations)
            texts = [name, prompt if several or not name else ""]
            row_labels.append("\n".join(text for text in texts if text))
    column_labels = [f"scale {scale:g}" for scale in axes.scales]
    footers = (
        [column_summary(results, c, axes.scales) for c in axes.combinations]
        if options.evaluate
        else []
    )
    with atomic_file(output) as temporary:
        labelled_grid(rows, row_labels, column_labels, footers).save(temporary, format="PNG")
    print(output)
    print(results.path)
    text = markdown_table(results, axes.combinations, axes.scales, command)
    write_table(output.with_suffix(".md"), text)
    chart = output.with_name(f"{output.stem}-plot.png")
    with atomic_file(chart) as temporary:
        plot(results, axes.combinations, axes.scales, temporary)
    print(chart)
