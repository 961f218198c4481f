"""How well a generator follows its prompts: accuracies by a judge, diversity and saturation."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxdiff.core.types import NDArray, UInt8
from jaxdiff.core.validate import check_shape as require_shape
from jaxdiff.core.validate import positive
from jaxdiff.evaluation.measures import MEASURES, pairwise_distance

# (prompts, seeds) -> uint8 images (n, s, s, 3), one for each prompt and seed.
Generate = Callable[[list[str], list[int]], np.ndarray]

DIVERSITY_PROMPTS = 16
DIVERSITY_SEEDS = 4


@runtime_checkable
class Prompt(Protocol):
    """A prompt whose image a judge can check."""

    @property
    def text(self) -> str:
        """The prompt."""
        ...


@runtime_checkable
class Score(Protocol):
    """A judge's verdict on one image."""

    @property
    def all_correct(self) -> bool:
        """Whether the image shows everything that its prompt asks for."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Prompts and the check of their images: a module or an object with these functions."""

    def standard_prompts(self) -> Sequence[Prompt]:
        """The prompts that compare models, none of which was trained on."""
        ...

    def parse_prompt(self, text: str) -> Prompt:
        """The prompt `text`; InputError for one that the judge cannot check."""
        ...

    def score_images(
        self, prompts: Sequence[Any], images: UInt8[NDArray, "n h w 3"]
    ) -> Sequence[Score]:
        """The score of each image against its prompt."""
        ...

    def answers(
        self, prompts: Sequence[Any], scores: Sequence[Any]
    ) -> Mapping[str, Sequence[bool]]:
        """By the name of an accuracy, whether each thing that it counts is correct."""
        ...

    def probe_prompts(self, stride: int = 1) -> Sequence[Prompt]:
        """Every `stride`-th of more prompts, whose images `probe_measures` measures."""
        ...

    def probe_measures(self, images: UInt8[NDArray, "n h w 3"]) -> Mapping[str, float]:
        """Measures of the images of `probe_prompts` by name."""
        ...

    def render_generator(self, prompts: Sequence[Any], size: int | None = None) -> Generate:
        """A generator whose images of `prompts` are all correct, `size` pixels wide."""
        ...

    def check_model_size(self, height: int, width: int) -> None:
        """InputError unless images of this size can be judged."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The fraction of correct answers, and the number of answers."""

    value: float
    count: int

    @property
    def error(self) -> float:
        """The binomial standard error."""
        return math.sqrt(self.value * (1 - self.value) / self.count)


def accuracies(answers: Mapping[str, Sequence[bool]]) -> dict[str, Accuracy]:
    """The accuracy of each name that has answers."""
    return {
        name: Accuracy(value=float(np.mean(each)), count=len(each))
        for name, each in answers.items()
        if each
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Accuracies and other measures by name."""

    accuracies: Mapping[str, Accuracy]
    measures: Mapping[str, float]

    def to_mapping(self) -> dict[str, Any]:
        """The report as a mapping that JSON can hold."""
        accuracies = {
            name: dataclasses.asdict(accuracy) for name, accuracy in self.accuracies.items()
        }
        return {"accuracies": accuracies, "measures": dict(self.measures)}

    def table(self) -> str:
        """The report as text: accuracies with their standard error, then the measures."""
        rows = [
            f"{name:<28} {accuracy.value:6.3f} ± {accuracy.error:.3f}  of {accuracy.count}"
            for name, accuracy in self.accuracies.items()
        ]
        return "\n".join([*rows, *(f"{name:<28} {v:6.3f}" for name, v in self.measures.items())])


def evaluate_alignment(
    generate: Generate,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    batch_size: int = 64,
    probes: Sequence[Prompt] = (),
) -> Report:
    """Evaluate one image for each prompt, the i-th with seed `seed` + i.

    The measures are `diversity` over DIVERSITY_PROMPTS prompts, those in MEASURES, and the judge's
    of the images of `probes`, of which image i has seed i. Compare them with those of the judge's
    `render_generator`.
    """
    positive("number of prompts", len(prompts))
    images = _generate_batches(generate, prompts, seed, batch_size)
    varied = diversity(generate, subsample(prompts, DIVERSITY_PROMPTS), batch_size=batch_size)
    measures = {"diversity": varied}
    measures |= {name: measure(images) for name, measure in MEASURES.items()}
    if probes:
        measures |= judge.probe_measures(_generate_batches(generate, probes, 0, batch_size))
    answers = judge.answers(prompts, judge.score_images(prompts, images))
    return Report(accuracies=accuracies(answers), measures=measures)


def model_generator(
    pipe: Any, judge: Judge, *, batch_size: int = 64, last: Any = None, **options: Any
) -> Generate:
    """The generator that calls `pipe` with `options` (guidance_scale, steps, ...).

    `last` is the model of a cascade that makes the images; None: `pipe`. InputError unless the
    judge can check images of its size.
    """
    defaults = (pipe if last is None else last).defaults
    judge.check_model_size(defaults.height, defaults.width)

    def generate(texts: list[str], seeds: list[int]) -> UInt8[NDArray, "n h w 3"]:
        call = {"seed": seeds, "batch_size": batch_size, "output": "numpy"}
        return np.asarray(pipe(texts, **call, **options).images)

    return generate


def subsample(prompts: Sequence[Any], n: int) -> Sequence[Any]:
    """At most `n` of the prompts, spread over the list."""
    return prompts[:: max(1, len(prompts) // n)][:n]


def diversity(
    generate: Generate,
    prompts: Sequence[Prompt],
    *,
    seeds: int = DIVERSITY_SEEDS,
    batch_size: int = 64,
) -> float:
    """`pairwise_distance` of `seeds` images of one prompt, averaged over prompts."""
    repeated = [prompt for prompt in prompts for _ in range(seeds)]
    images = _generate_batches(generate, repeated, 0, batch_size)
    groups = images.reshape(len(prompts), seeds, *images.shape[1:])
    return float(np.mean([pairwise_distance(group) for group in groups]))


def _generate_batches(
    generate: Generate, prompts: Sequence[Prompt], seed: int, batch_size: int
) -> UInt8[NDArray, "n h w 3"]:
    """The images of all prompts in batches of at most `batch_size`; seeds begin with `seed`."""
    parts = []
    for start in range(0, len(prompts), positive("batch_size", batch_size)):
        texts = [prompt.text for prompt in prompts[start : start + batch_size]]
        images = generate(texts, list(range(seed + start, seed + start + len(texts))))
        side = images.shape[1]
        require_shape("generated images", images, (len(texts), side, side, 3))
        parts.append(images)
    return np.concatenate(parts)
