"""Scenes as a data set of trainings: what a module in PROCEDURAL_KINDS has to offer."""

import itertools
from collections.abc import Iterator

import numpy as np

from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.core.validate import in_range
from jaxdiff.data.batches import Item
from jaxdiff.data.samples import Make
from jaxdiff.data.sampling_order import SamplePosition
from jaxdiff.scenes.judge import (
    answers,
    check_model_size,
    parse_prompt,
    probe_measures,
    probe_prompts,
    render_generator,
    score_images,
    standard_prompts,
)
from jaxdiff.scenes.labels import ATTRIBUTES, GRAMMAR, SLOTS
from jaxdiff.scenes.labels import collate_attributes as collate_labels
from jaxdiff.scenes.labels import collate_captioned as collate_captions
from jaxdiff.scenes.rendering import CANVAS
from jaxdiff.scenes.source import MAX_SIZE, MIN_SIZE, SceneSource, sample_prompts
from jaxdiff.training.config import DataConfig

__all__ = [
    "answers",
    "captions",
    "check_model_size",
    "collate_captions",
    "collate_labels",
    "fid_clip",
    "grid_prompts",
    "image_size",
    "label_slots",
    "labels",
    "make_items",
    "open_source",
    "parse_prompt",
    "probe_measures",
    "probe_prompts",
    "prompt_grammar",
    "render_generator",
    "score_images",
    "standard_prompts",
]

labels, label_slots, prompt_grammar = ATTRIBUTES, SLOTS, GRAMMAR
fid_clip = EMBEDDED / "clip"  # trained on scenes


def image_size(data: DataConfig) -> int:
    """Side in pixels of the images, from MIN_SIZE to MAX_SIZE."""
    return int(in_range("data.resolution", data.resolution or CANVAS, MIN_SIZE, MAX_SIZE))


def open_source(data: DataConfig, split: str = "train") -> SceneSource:
    """The scenes of `split`."""
    return SceneSource(
        seed=data.seed, split=split, variations=data.variations, size=image_size(data)
    )


def make_items(data: DataConfig) -> Make:
    """The function from an index to {"image", "caption", "time_ids"}, whole and in its own size."""
    source = open_source(data)
    sizes = np.array([source.size, source.size, 0, 0, source.size, source.size], np.int32)

    def make(index: int, place: SamplePosition) -> Item:
        del place
        scene = source[index]
        return {"image": scene["image"], "caption": scene["caption"], "time_ids": sizes}

    return make


def captions(data: DataConfig) -> Iterator[str]:
    """The captions of the training split, without end and without minimal changes."""
    source = SceneSource(seed=data.seed)
    return (source.example(i)[2] for i in itertools.count())


def grid_prompts(count: int) -> list[str]:
    """Half with one object, half with two, none trained on."""
    kinds = (sample_prompts(count // 2, 0, kind) for kind in ("one", "two"))
    return [prompt.text for prompts in kinds for prompt in prompts]
