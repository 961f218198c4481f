"""A sweep: images and measures at every combination of guidance, sampler, steps and scales."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.core.aliases import rename_guidance
from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray, UInt8
from jaxdiff.core.validate import in_range
from jaxdiff.evaluation.alignment import Judge, Prompt, evaluate_alignment, model_generator
from jaxdiff.evaluation.image_grid import labelled_grid
from jaxdiff.evaluation.measures import MEASURES
from jaxdiff.evaluation.sweep_plot import plot
from jaxdiff.evaluation.sweep_results import (
    TIMING_BATCH,
    TIMING_RUNS,
    Combination,
    Results,
    SweepPoint,
    column_summary,
    markdown_table,
    write_table,
)
from jaxdiff.guidance.base import MAX_SCALE, parse
from jaxdiff.pipeline.request import MAX_STEPS
from jaxdiff.samplers.base import get_sampler

EVALUATION_BATCH = 64

Images = Mapping[SweepPoint, UInt8[NDArray, "n h w 3"]]


class Axes(NamedTuple):
    """The rows and columns of the grid."""

    combinations: list[Combination]
    scales: tuple[float, ...]

    @property
    def points(self) -> list[SweepPoint]:
        """All points, row by row."""
        return [SweepPoint(c, scale) for c in self.combinations for scale in self.scales]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisValues:
    """What is compared; InputError for values that suit no model, and for no scales.

    Without rules, samplers or numbers of steps there is the default of a model.
    """

    scales: Sequence[float]
    guidance: Sequence[str] = ()
    samplers: Sequence[str] = ()
    steps: Sequence[int] = ()
    classifier_scales: Sequence[float] = (0.0,)
    clip_scales: Sequence[float] = (0.0,)

    def __post_init__(self) -> None:
        for rule in self.guidance:
            parse(rule)
        for sampler in self.samplers:
            get_sampler(sampler, kind="samplers")
        for number in self.steps:
            in_range("steps", number, 1, MAX_STEPS)
        for name in ("scales", "classifier_scales", "clip_scales"):
            if not getattr(self, name):
                raise InputError(f"{name}: got none, expected at least one")
            for scale in getattr(self, name):
                in_range(name, scale, 0, MAX_SCALE)

    def axes(self, pipe: Any) -> Axes:
        """The rows and columns for a model."""
        own = pipe.defaults
        rules = [rename_guidance(rule) for rule in self.guidance or (own.guidance,)]
        samplers, steps = self.samplers or (own.sampler,), self.steps or (own.steps,)
        unique = dict.fromkeys  # without repetitions, in order
        values = map(unique, (rules, samplers, steps, self.classifier_scales, self.clip_scales))
        combinations = [*map(Combination._make, itertools.product(*values))]
        return Axes(combinations, tuple(unique(self.scales)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is generated and measured at each point.

    With a `judge`, each point is also evaluated on every `prompt_stride`-th standard prompt.
    """

    pipe: Any
    guidance_model: Any = None  # the weaker model that `pipe` has
    prompts: Sequence[str]
    negative_prompt: str | None = None
    judge: Judge | None = None
    prompt_stride: int = 1
    measure_speed: bool = False
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Everything besides the point that its result depends on, as JSON values."""
        weaker = self.guidance_model
        return {
            "model": self.pipe.name,
            "weights": self.pipe.fingerprint,
            "guidance_model": None if weaker is None else f"{weaker.name} {weaker.fingerprint}",
            "device": self.pipe.device_name,  # seconds of other devices are not comparable
            "evaluate": self.judge is not None,
            "measure_speed": self.measure_speed,
            "prompt_stride": self.prompt_stride,
            "seed": self.seed,
            "prompt": list(self.prompts),
            "negative_prompt": self.negative_prompt,
        }

    def run(self, axes: Axes, results: Results, on_point: Callable[[int, str], None]) -> Images:
        """The images of all points; adds missing results to `results`.

        `on_point` gets the number and the name of each point before it is generated. InputError if
        the model supports none of the points.
        """
        standard = self.judge.standard_prompts() if self.judge else []
        standard = standard[:: self.prompt_stride]
        images: dict[SweepPoint, NDArray] = {}
        for number, point in enumerate(axes.points):
            label = point.combination.label(axes.combinations).replace("\n", " ")
            on_point(number, f"{label} {point.scale:g}")
            try:
                images[point], result = self._generate(point)
            except InputError as error:
                result = {"refused": str(error)}
            if point not in results.points:
                if self.judge is not None and point in images:
                    result |= self._evaluate(self.judge, point, standard)
                results.add(point, result)
        if not images:
            raise InputError(results.points[axes.points[0]]["refused"])
        return images

    def _generate(self, point: SweepPoint) -> tuple[UInt8[NDArray, "n h w 3"], dict[str, Any]]:
        """The images of a point and its result; InputError if the model does not support it."""
        pipe, prompts, choices = self.pipe, list(self.prompts), _call_options(point)
        if parse(choices["guidance"]).reads_negative_prompt:
            choices["negative_prompt"] = self.negative_prompt
        request = pipe.resolve(prompts, seed=[self.seed] * len(prompts), **choices)
        size = min(TIMING_BATCH, len(prompts))
        call = {"output": "numpy", "batch_size": size, **choices}
        images = np.asarray(pipe(prompts, seed=list(request.seeds), **call).images)
        result = {
            "evaluations": pipe.nfe(request),
            "measures": {name: measure(images) for name, measure in MEASURES.items()},
            "accuracies": {},
        }
        if self.measure_speed:
            repeated = [prompts[i % len(prompts)] for i in range(TIMING_BATCH)]
            call |= {"seed": list(range(TIMING_BATCH)), "batch_size": TIMING_BATCH}
            runs = [pipe(repeated, **call).timings for _ in range(1 + TIMING_RUNS)]
            runs = runs[1:]  # the first compiles
            result["seconds"] = min(t["total_s"] - t["compile_s"] for t in runs) / TIMING_BATCH
        return images, result

    def _evaluate(
        self, judge: Judge, point: SweepPoint, prompts: Sequence[Prompt]
    ) -> dict[str, Any]:
        """The accuracies and measures of a point on the standard prompts."""
        size = min(EVALUATION_BATCH, len(prompts))
        generate = model_generator(self.pipe, judge, batch_size=size, **_call_options(point))
        report = evaluate_alignment(generate, judge, prompts, seed=self.seed, batch_size=size)
        accuracies = {
            name: {"value": each.value, "count": each.count, "error": each.error}
            for name, each in report.accuracies.items()
        }
        return {"measures": dict(report.measures), "accuracies": accuracies}

    def write(
        self, output: pathlib.Path, axes: Axes, results: Results, images: Images, command: str
    ) -> list[pathlib.Path]:
        """Write the grid to `output`, the table and the plot beside it; returns what was written.

        `command` is shown above the table.
        """
        several = len(self.prompts) > 1
        rows: list[list[NDArray | None]] = []
        row_labels = []
        for combination in axes.combinations:
            column = [images.get(SweepPoint(combination, scale)) for scale in axes.scales]
            for number, prompt in enumerate(self.prompts):
                rows.append([None if found is None else found[number] for found in column])
                name = combination.label(axes.combinations)
                texts = [name, prompt if several or not name else ""]
                row_labels.append("\n".join(text for text in texts if text))
        column_labels = [f"scale {scale:g}" for scale in axes.scales]
        footers = (
            []
            if self.judge is None
            else [column_summary(results, c, axes.scales) for c in axes.combinations]
        )
        with atomic_file(output) as temporary:
            labelled_grid(rows, row_labels, column_labels, footers).save(temporary, format="PNG")
        table, chart = output.with_suffix(".md"), output.with_name(f"{output.stem}-plot.png")
        text = markdown_table(results, axes.combinations, axes.scales, command)
        tables = [table] if write_table(table, text) else []
        with atomic_file(chart) as temporary:
            plot(results, axes.combinations, axes.scales, temporary)
        return [output, results.path, *tables, chart]


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
