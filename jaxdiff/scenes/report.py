"""How well a generator follows its prompts: accuracies, diversity and saturation."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdiff.core.types import NDArray, UInt8
from jaxdiff.core.validate import check_shape as require_shape
from jaxdiff.core.validate import positive
from jaxdiff.scenes.detector import Score, circle_deviation, detect, score
from jaxdiff.scenes.rendering import CANVAS, NUM_LAYOUT_UNIFORMS, layout_objects, render
from jaxdiff.scenes.source import (
    Scene,
    SceneObject,
    ScenePrompt,
    describe,
    is_held_out_pair,
    sample_prompts,
)
from jaxdiff.scenes.specification import BACKGROUNDS, COLOURS, SIZES

# (prompts, seeds) -> uint8 images (n, s, s, 3), one for each prompt and seed.
Generate = Callable[[list[str], list[int]], np.ndarray]

NUM_PROMPTS = {"one": 179, "two": 333, "heldout-one": 64, "heldout-two": 64}
CLIPPED_RANGE = (2, 253)  # channel values at or beyond these count as clipped
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # weights of red, green and blue
DIVERSITY_PROMPTS = 16
DIVERSITY_SEEDS = 4
NUM_CIRCLES = 100  # more than the number of different ones


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The fraction of correct answers, and the number of answers."""

    value: float
    count: int

    @property
    def error(self) -> float:
        """The binomial standard error."""
        return math.sqrt(self.value * (1 - self.value) / self.count)


@dataclass(frozen=True, kw_only=True)
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


def standard_prompts(seed: int = 0) -> list[ScenePrompt]:
    """The prompts that compare models: 512 of the validation split, 128 with held-out pairs.

    Of the 512, 35% have one object, as in the data set; see `sample_prompts`.
    """
    return [prompt for kind, n in NUM_PROMPTS.items() for prompt in sample_prompts(n, seed, kind)]


def subsample(prompts: Sequence[ScenePrompt], n: int) -> Sequence[ScenePrompt]:
    """At most `n` of the prompts, spread over the list."""
    return prompts[:: max(1, len(prompts) // n)][:n]


def score_images(prompts: Sequence[ScenePrompt], images: UInt8[NDArray, "n h w 3"]) -> list[Score]:
    """The score of each image against its prompt."""
    return [score(p.scene, detect(image)) for p, image in zip(prompts, images, strict=True)]


def clipped_fraction(images: UInt8[NDArray, "n h w 3"]) -> float:
    """The fraction of channel values at an end of their range, which includes pure white."""
    low, high = CLIPPED_RANGE
    return float(np.mean((images <= low) | (images >= high)))


def chroma(images: UInt8[NDArray, "n h w 3"]) -> float:
    """The mean over pixels of (largest - smallest channel) / 255."""
    return float(np.mean(images.max(-1).astype(np.float64) - images.min(-1)) / 255)


def contrast(images: UInt8[NDArray, "n h w 3"]) -> float:
    """The standard deviation of the luminance (Rec. 709) of an image, averaged over images."""
    return float(np.mean(np.std(images / 255 @ LUMINANCE, axis=(1, 2))))


def pairwise_distance(images: UInt8[NDArray, "k h w 3"]) -> float:
    """The mean root-mean-square difference, on a scale of 0 to 1, over all pairs of images."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    rows, columns = np.triu_indices(len(flat), k=1)
    return float(np.sqrt(np.mean((flat[rows] - flat[columns]) ** 2, axis=1)).mean())


def diversity(
    generate: Generate,
    prompts: Sequence[ScenePrompt],
    *,
    seeds: int = DIVERSITY_SEEDS,
    batch_size: int = 64,
) -> float:
    """`pairwise_distance` of `seeds` images of one prompt, averaged over prompts."""
    texts = [prompt.text for prompt in prompts for _ in range(seeds)]
    images = _generate_batches(generate, texts, list(range(len(texts))), batch_size)
    groups = images.reshape(len(prompts), seeds, *images.shape[1:])
    return float(np.mean([pairwise_distance(group) for group in groups]))


def circle_prompts(count: int) -> list[ScenePrompt]:
    """Prompts with one circle each; colours, sizes and backgrounds alternate."""
    looks = itertools.cycle(itertools.product(BACKGROUNDS, SIZES, COLOURS))
    scenes = [
        Scene(
            objects=(SceneObject(colour=colour, shape="circle", size=size),), background=background
        )
        for background, size, colour in itertools.islice(looks, count)
    ]
    return [ScenePrompt(text=describe(scene), scene=scene) for scene in scenes]


def mean_circle_deviation(generate: Generate, count: int, *, batch_size: int = 64) -> float:
    """The mean `circle_deviation` of `count` images of circles; NaN if none shows one object.

    Image i has seed i.
    """
    texts = [prompt.text for prompt in circle_prompts(count)]
    images = _generate_batches(generate, texts, list(range(count)), batch_size)
    found = [deviation for image in images if (deviation := circle_deviation(image)) is not None]
    return float(np.mean(found)) if found else math.nan


def _generate_batches(
    generate: Generate, texts: list[str], seeds: list[int], batch_size: int
) -> UInt8[NDArray, "n h w 3"]:
    """All images, generated in batches of at most `batch_size`."""
    parts = []
    for start in range(0, len(texts), positive("batch_size", batch_size)):
        part = slice(start, start + batch_size)
        images = generate(texts[part], seeds[part])
        side = images.shape[1]
        require_shape("generated images", images, (len(texts[part]), side, side, 3))
        parts.append(images)
    return np.concatenate(parts)


def _accuracy(answers: Iterable[bool | None]) -> Accuracy | None:
    """The fraction of True among the answers that are not None; None if there are none."""
    known = [answer for answer in answers if answer is not None]
    return Accuracy(value=float(np.mean(known)), count=len(known)) if known else None


def summarise(prompts: Sequence[ScenePrompt], scores: Sequence[Score]) -> dict[str, Accuracy]:
    """Accuracies by name; those of attributes over prompts without a held-out pair.

    Colour, shape and size count objects; background, number and relation count images. What a
    prompt does not specify is not counted. "... correct" counts images in which everything is
    correct.
    """
    held_out = [
        any(is_held_out_pair(t.colour, t.shape) for t in prompt.scene.objects) for prompt in prompts
    ]
    trained = [s for s, new in zip(scores, held_out, strict=True) if not new]

    def all_correct(new: bool, objects: int) -> Accuracy | None:
        rows = zip(prompts, scores, held_out, strict=True)
        return _accuracy(
            s.all_correct for p, s, test in rows if test is new and len(p.scene.objects) == objects
        )

    accuracies = {
        "background": _accuracy(s.background for s in trained),
        "number": _accuracy(s.count for s in trained),
        "colour": _accuracy(correct for s in trained for correct in s.colours),
        "shape": _accuracy(correct for s in trained for correct in s.shapes),
        "size": _accuracy(correct for s in trained for correct in s.sizes),
        "relation": _accuracy(s.relation for s in trained),
        "one object correct": all_correct(False, 1),
        "two objects correct": all_correct(False, 2),
        "held-out one object correct": all_correct(True, 1),
        "held-out two objects correct": all_correct(True, 2),
        "held-out correct": _accuracy(
            s.all_correct for s, t in zip(scores, held_out, strict=True) if t
        ),
    }
    return {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}


def evaluate_alignment(
    generate: Generate,
    prompts: Sequence[ScenePrompt],
    *,
    seed: int = 0,
    batch_size: int = 64,
    circles: int = 0,
) -> Report:
    """Evaluate one image for each prompt, the i-th with seed `seed` + i.

    The measures are `diversity` over DIVERSITY_PROMPTS prompts, `chroma`, `clipped_fraction`,
    `contrast`, and the `mean_circle_deviation` of `circles` images. Compare them with those of
    `render_generator`, which renders the prompts exactly.
    """
    positive("number of prompts", len(prompts))
    texts = [prompt.text for prompt in prompts]
    images = _generate_batches(generate, texts, list(range(seed, seed + len(texts))), batch_size)
    measures = {
        "diversity": diversity(
            generate, subsample(prompts, DIVERSITY_PROMPTS), batch_size=batch_size
        ),
        "chroma": chroma(images),
        "clipped": clipped_fraction(images),
        "contrast": contrast(images),
    }
    if circles:
        measures["circle deviation"] = mean_circle_deviation(
            generate, circles, batch_size=batch_size
        )
    return Report(accuracies=summarise(prompts, score_images(prompts, images)), measures=measures)


def _fill_in(scene: Scene, rng: np.random.Generator) -> Scene:
    """`scene` with random values for what it does not specify."""
    objects = tuple(
        dataclasses.replace(obj, size=obj.size or SIZES[rng.integers(len(SIZES))])
        for obj in scene.objects
    )
    background = scene.background or BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return dataclasses.replace(scene, objects=objects, background=background)


def render_generator(prompts: Sequence[ScenePrompt], size: int = CANVAS) -> Generate:
    """A generator that renders these prompts exactly: an upper bound for any model.

    It knows all `circle_prompts` too. Its images are `size` pixels wide.
    """
    scenes = {prompt.text: prompt.scene for prompt in (*circle_prompts(NUM_CIRCLES), *prompts)}

    def generate(texts: list[str], seeds: list[int]) -> UInt8[NDArray, "n h w 3"]:
        images = []
        for text, seed in zip(texts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            scene = _fill_in(scenes[text], rng)
            images.append(
                render(scene, layout_objects(scene, rng.random(NUM_LAYOUT_UNIFORMS)), size)
            )
        return np.stack(images)

    return generate
