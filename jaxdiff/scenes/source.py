"""An endless, deterministic data set of captioned scenes behind grain's source interface."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.scenes.captions import describe, underspecify
from jaxdiff.scenes.rendering import (
    CANVAS,
    NUM_LAYOUT_UNIFORMS,
    ObjectLayout,
    layout_objects,
    render,
)
from jaxdiff.scenes.specification import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneObject,
    arrangement,
    split_of,
)

SINGLE_OBJECT_PROBABILITY = 0.35  # the others have two
KINDS = ("one", "two", "heldout-one", "heldout-two")
DATASET_SIZE = 1 << 40  # items; far more than any training reads
MAX_VARIATIONS = 8
MIN_SIZE, MAX_SIZE = 32, 1024  # pixels along a side


def _pick(choices: Sequence[str], u: float) -> str:
    return choices[int(u * len(choices))]


def sample_scene(rng: np.random.Generator, split: str = "train", count: int | None = None) -> Scene:
    """A full specification of `split` with `count` objects.

    None: one object with SINGLE_OBJECT_PROBABILITY, or two.
    Everything is uniform among the scenes of the split.
    """
    one_of("split", split, SPLITS)
    if count is None:
        count = 1 if rng.random() < SINGLE_OBJECT_PROBABILITY else 2
    while True:
        u = rng.random(8).tolist()
        objects = tuple(
            SceneObject(size=_pick(SIZES, a), colour=_pick(COLOURS, b), shape=_pick(SHAPES, c))
            for a, b, c in (u[:3], u[3:6])[:count]
        )
        if _look_identical(objects):
            continue
        relation = _pick(RELATIONS, u[6]) if count == 2 else None
        scene = Scene(objects=objects, relation=relation, background=_pick(BACKGROUNDS, u[7]))
        if split_of(scene) == split:
            return scene


def _look_identical(objects: tuple[SceneObject, ...]) -> bool:
    looks = {(obj.colour, obj.shape) for obj in objects}
    return len(looks) < len(objects)


def _object_edits(scene: Scene, i: int) -> Iterator[tuple[SceneObject, ...]]:
    """One attribute of object i changed, a tuple of objects for each new value."""
    choices = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
    for name, values in choices.items():
        for value in values:
            if value != getattr(scene.objects[i], name):
                changed = replace(scene.objects[i], **{name: value})
                yield (*scene.objects[:i], changed, *scene.objects[i + 1 :])


def _minimal_edits(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """All minimal changes of a full specification, each with the name of what was changed."""
    for background in BACKGROUNDS:
        if background != scene.background:
            yield "background", replace(scene, background=background)
    for i, obj in enumerate(scene.objects):
        for objects in _object_edits(scene, i):
            if not _look_identical(objects):
                kind = next(k for k in ("colour", "shape", "size") if _differs(objects[i], obj, k))
                yield kind, replace(scene, objects=objects)
    if len(scene.objects) == 2:
        for relation in RELATIONS:
            if relation != scene.relation:
                yield "relation", replace(scene, relation=relation)
        first, second = scene.objects
        for kind in ("colour", "shape"):
            if _differs(first, second, kind):
                swapped = (
                    replace(first, **{kind: getattr(second, kind)}),
                    replace(second, **{kind: getattr(first, kind)}),
                )
                yield f"swap {kind}", replace(scene, objects=swapped)


def _differs(first: SceneObject, second: SceneObject, name: str) -> bool:
    return getattr(first, name) != getattr(second, name)


def sample_variations(scene: Scene, count: int, rng: np.random.Generator) -> list[Scene]:
    """`count` different scenes, each one minimal change away from `scene`, kinds equally likely.

    Changes of a training scene stay in training; changes of another may be any scene. No two of
    them, nor one and the original, are the same arrangement.
    """
    training = split_of(scene) == "train"
    kinds: dict[str, list[Scene]] = {}
    for kind, other in _minimal_edits(scene):
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
        raise InputError(f"variations: got {count} for {scene}, expected at most {len(chosen)}")
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
        self.size = int(in_range("size", size, MIN_SIZE, MAX_SIZE))
        # Neighbouring items share their block, which the cache makes only once.
        self._block = functools.lru_cache(maxsize=64)(self._make_block)

    def __len__(self) -> int:
        return DATASET_SIZE

    def __repr__(self) -> str:
        return (
            f"SceneSource(seed={self.seed}, split={self.split!r}, variations={self.variations}, "
            f"size={self.size})"
        )

    def _make_block(self, number: int) -> list[tuple[Scene, ObjectLayout, str]]:
        entropy = [self.seed, SPLITS.index(self.split), self.variations, number]
        rng = np.random.default_rng(entropy)
        scene = sample_scene(rng, self.split)
        block = [scene, *sample_variations(scene, self.variations - 1, rng)]
        jitter = rng.random(NUM_LAYOUT_UNIFORMS)
        caption_seed = int(rng.integers(2**63))
        captions = [
            describe(underspecify(item, np.random.default_rng(caption_seed), *block))
            for item in block
        ]
        layouts = [layout_objects(item, jitter) for item in block]
        return list(zip(block, layouts, captions, strict=True))

    def example(self, index: int) -> tuple[Scene, ObjectLayout, str]:
        """The full specification, the layout and the caption of item `index`."""
        in_range("index", index, 0, DATASET_SIZE - 1)
        return self._block(index // self.variations)[index % self.variations]

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray | str | Scene]:
        scene, layout, words = self.example(index.__index__())
        return {"image": render(scene, layout, self.size), "caption": words, "scene": scene}


@dataclass(frozen=True, kw_only=True)
class ScenePrompt:
    """A prompt and the scene that its image must show; unspecified attributes are None."""

    text: str
    scene: Scene


def sample_prompts(n: int, seed: int, kind: str) -> list[ScenePrompt]:
    """`n` prompts of a kind in KINDS whose texts are never training captions.

    Two objects: an arrangement of the validation split, with random sizes and background omitted.
    One object: a specification of the validation split, with size and background. The held-out
    kinds have at least one held-out pair, in captions of the same forms.
    """
    one_of("kind", kind, KINDS)
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    split = "heldout" if kind.startswith("heldout") else "validation"
    count = 1 if kind.endswith("one") else 2
    prompts = []
    for _ in range(n):
        scene = sample_scene(rng, split, count)
        shown = scene if kind == "one" else underspecify(scene, rng)
        prompts.append(ScenePrompt(text=describe(shown), scene=shown))
    return prompts
