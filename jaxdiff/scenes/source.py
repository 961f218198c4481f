"""An endless, deterministic data set of captioned scenes behind grain's source interface."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.data.batches import Item
from jaxdiff.data.samples import Make
from jaxdiff.data.sampling_order import SamplePosition
from jaxdiff.scenes.captions import describe, leave_open
from jaxdiff.scenes.rendering import CANVAS, PLACEMENT_DRAWS, Layout, draw, place
from jaxdiff.scenes.specification import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Thing,
    arrangement,
    held_out,
    split_of,
)

SINGLE_SHARE = 0.35  # of the scenes have one thing
KINDS = ("one", "two", "heldout-one", "heldout-two")
LENGTH = 1 << 40  # items of a source; far more than a training reads
MAX_VARIATIONS = 8
MAX_SIZE = 1024  # pixels along a side


def _pick(choices: Sequence[str], u: float) -> str:
    return choices[int(u * len(choices))]


def sample_scene(rng: np.random.Generator, split: str = "train", count: int | None = None) -> Scene:
    """A full specification of `split` with `count` things (None: one with SINGLE_SHARE, or two).

    Everything is uniform among the scenes of the split.
    """
    one_of("split", split, SPLITS)
    if count is None:
        count = 1 if rng.random() < SINGLE_SHARE else 2
    while True:
        u = rng.random(8).tolist()
        things = tuple(
            Thing(size=_pick(SIZES, a), colour=_pick(COLOURS, b), shape=_pick(SHAPES, c))
            for a, b, c in (u[:3], u[3:6])[:count]
        )
        if _alike(things):
            continue
        relation = _pick(RELATIONS, u[6]) if count == 2 else None
        scene = Scene(things=things, relation=relation, background=_pick(BACKGROUNDS, u[7]))
        if split_of(scene) == split:
            return scene


def _alike(things: tuple[Thing, ...]) -> bool:
    looks = {(thing.colour, thing.shape) for thing in things}
    return len(looks) < len(things)


def _changes_of_thing(scene: Scene, i: int) -> Iterator[tuple[Thing, ...]]:
    """One attribute of thing i changed, a tuple of things for each new value."""
    choices = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
    for name, values in choices.items():
        for value in values:
            if value != getattr(scene.things[i], name):
                changed = replace(scene.things[i], **{name: value})
                yield (*scene.things[:i], changed, *scene.things[i + 1 :])


def _neighbours(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """All minimal changes of a full specification, each with the name of what was changed."""
    for background in BACKGROUNDS:
        if background != scene.background:
            yield "background", replace(scene, background=background)
    for i, thing in enumerate(scene.things):
        for things in _changes_of_thing(scene, i):
            if not _alike(things):
                kind = next(k for k in ("colour", "shape", "size") if _differs(things[i], thing, k))
                yield kind, replace(scene, things=things)
    if len(scene.things) == 2:
        for relation in RELATIONS:
            if relation != scene.relation:
                yield "relation", replace(scene, relation=relation)
        first, second = scene.things
        for kind in ("colour", "shape"):
            if _differs(first, second, kind):
                swapped = (
                    replace(first, **{kind: getattr(second, kind)}),
                    replace(second, **{kind: getattr(first, kind)}),
                )
                yield f"swap {kind}", replace(scene, things=swapped)


def _differs(first: Thing, second: Thing, name: str) -> bool:
    return getattr(first, name) != getattr(second, name)


def vary(scene: Scene, count: int, rng: np.random.Generator) -> list[Scene]:
    """`count` different scenes, each one minimal change away from `scene`, kinds equally likely.

    Changes of a training scene stay in training; changes of another may be any scene. No two of
    them, nor one and the original, are the same arrangement.
    """
    training = split_of(scene) == "train"
    kinds: dict[str, list[Scene]] = {}
    for kind, other in _neighbours(scene):
        if not training or split_of(other) == "train":
            kinds.setdefault(kind, []).append(other)
    seen = {(arrangement(scene), scene.background)}
    chosen: list[Scene] = []
    while len(chosen) < count and kinds:
        names = sorted(kinds)
        kind = names[int(rng.integers(len(names)))]
        other = kinds[kind].pop(int(rng.integers(len(kinds[kind]))))
        if not kinds[kind]:
            del kinds[kind]
        if (arrangement(other), other.background) not in seen:
            seen.add((arrangement(other), other.background))
            chosen.append(other)
    if len(chosen) < count:
        raise InputError(f"variations: got {count} of {scene}, expected at most {len(chosen)}")
    return chosen


class SceneSource:
    """Random access to scenes: `[i]` has "image" uint8 (s, s, 3), "caption" str, "scene" Scene.

    `size` s changes the image alone. An item is a function of (seed, split, i) alone. With
    `variations` k, items come in blocks of k: a scene and k - 1 minimal changes of it with the same
    jitter, whose captions all differ.
    """

    def __init__(
        self, *, seed: int, split: str = "train", variations: int = 1, size: int = CANVAS
    ) -> None:
        self.seed = int(in_range("seed", seed, 0, 2**63 - 1))
        self.split = one_of("split", split, SPLITS)
        self.variations = int(in_range("variations", variations, 1, MAX_VARIATIONS))
        self.size = int(in_range("size", size, CANVAS, MAX_SIZE))
        # Neighbouring items share their block; the cache saves drawing it up once for each.
        self._block = functools.lru_cache(maxsize=64)(self._make_block)

    def __len__(self) -> int:
        return LENGTH

    def __repr__(self) -> str:
        return (
            f"SceneSource(seed={self.seed}, split={self.split!r}, variations={self.variations}, "
            f"size={self.size})"
        )

    def _make_block(self, number: int) -> list[tuple[Scene, Layout, str]]:
        entropy = [self.seed, SPLITS.index(self.split), self.variations, number]
        rng = np.random.default_rng(entropy)
        scene = sample_scene(rng, self.split)
        block = [scene, *vary(scene, self.variations - 1, rng)]
        jitter = rng.random(PLACEMENT_DRAWS)
        wording = int(rng.integers(2**63))
        captions = [
            describe(leave_open(item, np.random.default_rng(wording), *block)) for item in block
        ]
        layouts = [place(item, jitter) for item in block]
        return list(zip(block, layouts, captions, strict=True))

    def example(self, index: int) -> tuple[Scene, Layout, str]:
        """The full specification, the layout and the caption of item `index`."""
        in_range("index", index, 0, LENGTH - 1)
        return self._block(index // self.variations)[index % self.variations]

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray | str | Scene]:
        scene, layout, words = self.example(index.__index__())
        return {"image": draw(scene, layout, self.size), "caption": words, "scene": scene}


def scene_maker(source: SceneSource) -> Make:
    """Samples {"image", "caption", "time_ids"} of scenes, whole and in their own size."""
    sizes = np.array([source.size, source.size, 0, 0, source.size, source.size], np.int32)

    def make(index: int, place: SamplePosition) -> Item:
        del place
        scene = source[index]
        return {"image": scene["image"], "caption": scene["caption"], "time_ids": sizes}

    return make


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text and what a picture of it must show; what the text leaves unsaid is None."""

    text: str
    scene: Scene


def sample_prompts(n: int, seed: int, kind: str) -> list[Prompt]:
    """`n` prompts of a kind in KINDS whose texts are never training captions.

    Two things: an arrangement reserved for validation, sizes and background left out at random.
    One thing: a reserved specification, size and background said. The held-out kinds have at
    least one held-out pair, in the same wordings.
    """
    one_of("kind", kind, KINDS)
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    split = "heldout" if kind.startswith("heldout") else "validation"
    count = 1 if kind.endswith("one") else 2
    prompts = []
    for _ in range(n):
        scene = sample_scene(rng, split, count)
        said = scene if kind == "one" else leave_open(scene, rng)
        prompts.append(Prompt(text=describe(said), scene=said))
    return prompts


__all__ = [
    "KINDS",
    "Layout",
    "Prompt",
    "Scene",
    "SceneSource",
    "Thing",
    "describe",
    "draw",
    "held_out",
    "place",
    "sample_prompts",
    "sample_scene",
    "vary",
]
