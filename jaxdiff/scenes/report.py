"""A table of how well a generator follows its prompts, with how varied and how saturated it is."""

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
from jaxdiff.scenes.judge import Score, circle_deviation, judge, score
from jaxdiff.scenes.rendering import CANVAS, PLACEMENT_DRAWS, draw, place
from jaxdiff.scenes.source import Prompt, Scene, Thing, describe, held_out, sample_prompts
from jaxdiff.scenes.specification import BACKGROUNDS, COLOURS, SIZES

# (prompts, seeds) -> uint8 pictures (n, s, s, 3), one for each prompt and seed.
Generate = Callable[[list[str], list[int]], np.ndarray]

PROMPTS = {"one": 179, "two": 333, "heldout-one": 64, "heldout-two": 64}
CLIPPED = (2, 253)  # channel values at or beyond these count as clipped
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # shares of red, green and blue
DIVERSITY_PROMPTS = 16
DIVERSITY_SEEDS = 4
CIRCLES = 100  # more than there are different ones


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of right answers and how many there were to give."""

    value: float
    count: int

    @property
    def error(self) -> float:
        """The binomial standard error of the share."""
        return math.sqrt(self.value * (1 - self.value) / self.count)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Shares of right answers by name, and plain measures by name."""

    shares: Mapping[str, Share]
    measures: Mapping[str, float]

    def to_mapping(self) -> dict[str, Any]:
        """The report as a mapping that JSON can hold."""
        shares = {name: dataclasses.asdict(share) for name, share in self.shares.items()}
        return {"shares": shares, "measures": dict(self.measures)}

    def table(self) -> str:
        """The report as lines of text: shares with their standard error, then the measures."""
        rows = [
            f"{name:<22} {share.value:6.3f} ± {share.error:.3f}  of {share.count}"
            for name, share in self.shares.items()
        ]
        return "\n".join([*rows, *(f"{name:<22} {v:6.3f}" for name, v in self.measures.items())])


def standard_prompts(seed: int = 0) -> list[Prompt]:
    """The prompts models are compared on: 512 not trained on, and 128 with held-out pairs.

    Of the 512, 35% have one thing, as in the data set; `sample_prompts` says what is kept apart.
    """
    return [prompt for kind, n in PROMPTS.items() for prompt in sample_prompts(n, seed, kind)]


def some(prompts: Sequence[Prompt], n: int) -> Sequence[Prompt]:
    """At most `n` of the prompts, spread over the list."""
    return prompts[:: max(1, len(prompts) // n)][:n]


def judged(prompts: Sequence[Prompt], images: UInt8[NDArray, "n h w 3"]) -> list[Score]:
    """What each picture has right of its prompt."""
    return [score(p.scene, judge(image)) for p, image in zip(prompts, images, strict=True)]


def clipped(images: UInt8[NDArray, "n h w 3"]) -> float:
    """The share of channel values at an end of their range; a white background is such an end."""
    low, high = CLIPPED
    return float(np.mean((images <= low) | (images >= high)))


def chroma(images: UInt8[NDArray, "n h w 3"]) -> float:
    """The mean over pixels of (largest - smallest channel) / 255."""
    return float(np.mean(images.max(-1).astype(np.float64) - images.min(-1)) / 255)


def contrast(images: UInt8[NDArray, "n h w 3"]) -> float:
    """The standard deviation of the luminance (Rec. 709) over a picture, averaged over pictures."""
    return float(np.mean(np.std(images / 255 @ LUMINANCE, axis=(1, 2))))


def pairwise_distance(images: UInt8[NDArray, "k h w 3"]) -> float:
    """The mean root-mean-square difference, on a scale of 0 to 1, over all pairs of pictures."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    rows, columns = np.triu_indices(len(flat), k=1)
    return float(np.sqrt(np.mean((flat[rows] - flat[columns]) ** 2, axis=1)).mean())


def diversity(
    generate: Generate,
    prompts: Sequence[Prompt],
    *,
    seeds: int = DIVERSITY_SEEDS,
    batch_size: int = 64,
) -> float:
    """`pairwise_distance` of `seeds` pictures of one prompt, averaged over prompts."""
    texts = [prompt.text for prompt in prompts for _ in range(seeds)]
    images = _pictures(generate, texts, list(range(len(texts))), batch_size)
    groups = images.reshape(len(prompts), seeds, *images.shape[1:])
    return float(np.mean([pairwise_distance(group) for group in groups]))


def circle_prompts(count: int) -> list[Prompt]:
    """Prompts of one circle each; colours, sizes and backgrounds take turns."""
    looks = itertools.cycle(itertools.product(BACKGROUNDS, SIZES, COLOURS))
    scenes = [
        Scene(things=(Thing(colour=colour, shape="circle", size=size),), background=background)
        for background, size, colour in itertools.islice(looks, count)
    ]
    return [Prompt(text=describe(scene), scene=scene) for scene in scenes]


def roundness(generate: Generate, count: int, *, batch_size: int = 64) -> float:
    """The mean `circle_deviation` of `count` pictures of circles; NaN if none shows one object.

    Picture i has seed i.
    """
    texts = [prompt.text for prompt in circle_prompts(count)]
    images = _pictures(generate, texts, list(range(count)), batch_size)
    found = [deviation for image in images if (deviation := circle_deviation(image)) is not None]
    return float(np.mean(found)) if found else math.nan


def _pictures(
    generate: Generate, texts: list[str], seeds: list[int], batch_size: int
) -> UInt8[NDArray, "n h w 3"]:
    """All pictures, asked for in batches of at most `batch_size`."""
    parts = []
    for start in range(0, len(texts), positive("batch_size", batch_size)):
        part = slice(start, start + batch_size)
        images = generate(texts[part], seeds[part])
        side = images.shape[1]
        require_shape("generated images", images, (len(texts[part]), side, side, 3))
        parts.append(images)
    return np.concatenate(parts)


def _share(answers: Iterable[bool | None]) -> Share | None:
    """The share of True among the answers that are not None; None if there are none."""
    judged = [answer for answer in answers if answer is not None]
    return Share(value=float(np.mean(judged)), count=len(judged)) if judged else None


def summarise(prompts: Sequence[Prompt], scores: Sequence[Score]) -> dict[str, Share]:
    """Shares of right answers; attributes over prompts without a held-out pair.

    Colour, shape and size count things, background, number and relation pictures; what a prompt
    leaves open is not counted. "... all right" are pictures with everything right at once.
    """
    tested = [any(held_out(t.colour, t.shape) for t in prompt.scene.things) for prompt in prompts]
    seen = [s for s, new in zip(scores, tested, strict=True) if not new]

    def whole(new: bool, things: int) -> Share | None:
        rows = zip(prompts, scores, tested, strict=True)
        return _share(
            s.all_right for p, s, test in rows if test is new and len(p.scene.things) == things
        )

    shares = {
        "background": _share(s.background for s in seen),
        "number": _share(s.count for s in seen),
        "colour": _share(right for s in seen for right in s.colours),
        "shape": _share(right for s in seen for right in s.shapes),
        "size": _share(right for s in seen for right in s.sizes),
        "relation": _share(s.relation for s in seen),
        "one all right": whole(False, 1),
        "two all right": whole(False, 2),
        "held-out one all right": whole(True, 1),
        "held-out two all right": whole(True, 2),
        "held-out all right": _share(s.all_right for s, t in zip(scores, tested, strict=True) if t),
    }
    return {name: share for name, share in shares.items() if share is not None}


def alignment(
    generate: Generate,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    batch_size: int = 64,
    circles: int = 0,
) -> Report:
    """Judge one picture for each prompt, the i-th with seed `seed` + i.

    The measures are `diversity` over DIVERSITY_PROMPTS prompts spread over the list, `chroma`,
    `clipped`, `contrast`, and the `roundness` of so many `circles`; they mean something next to
    those of `renders`, which draws what was asked for.
    """
    positive("number of prompts", len(prompts))
    texts = [prompt.text for prompt in prompts]
    images = _pictures(generate, texts, list(range(seed, seed + len(texts))), batch_size)
    measures = {
        "diversity": diversity(generate, some(prompts, DIVERSITY_PROMPTS), batch_size=batch_size),
        "chroma": chroma(images),
        "clipped": clipped(images),
        "contrast": contrast(images),
    }
    if circles:
        measures["circle deviation"] = roundness(generate, circles, batch_size=batch_size)
    return Report(shares=summarise(prompts, judged(prompts, images)), measures=measures)


def _completed(scene: Scene, rng: np.random.Generator) -> Scene:
    """`scene` with what it leaves open drawn at random."""
    things = tuple(
        dataclasses.replace(thing, size=thing.size or SIZES[rng.integers(len(SIZES))])
        for thing in scene.things
    )
    background = scene.background or BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return dataclasses.replace(scene, things=things, background=background)


def renders(prompts: Sequence[Prompt], size: int = CANVAS) -> Generate:
    """The perfect generator of these prompts, which draws them: what the best model would score.

    It knows all `circle_prompts` too. Its pictures are `size` pixels wide.
    """
    scenes = {prompt.text: prompt.scene for prompt in (*circle_prompts(CIRCLES), *prompts)}

    def generate(texts: list[str], seeds: list[int]) -> UInt8[NDArray, "n h w 3"]:
        images = []
        for text, seed in zip(texts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            scene = _completed(scenes[text], rng)
            images.append(draw(scene, place(scene, rng.random(PLACEMENT_DRAWS)), size))
        return np.stack(images)

    return generate
