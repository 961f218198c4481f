"""Data that a program renders, with all that trainings ask of it.

The library knows such a data set by the name of its module alone, which is imported here.
"""

import importlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from jaxdiff.core.errors import InputError
from jaxdiff.data.batches import Batch, Item
from jaxdiff.data.samples import Make
from jaxdiff.evaluation.alignment import Judge
from jaxdiff.models.attributes import LabelSet
from jaxdiff.models.prompt_labels import PromptGrammar
from jaxdiff.training.config import PROCEDURAL_KINDS, DataConfig

EMBEDDED_DATA = "scenes"  # what the embedded model was trained on


@runtime_checkable
class ProceduralDataset(Judge, Protocol):
    """The functions and tables of a module in PROCEDURAL_KINDS."""

    labels: LabelSet  # what a classifier predicts of an image
    label_slots: tuple[tuple[str, ...], ...]  # its groups, by the text encoder's hidden state
    prompt_grammar: PromptGrammar  # how captions name the labels
    fid_clip: pathlib.Path  # the CLIP model for FID where a training names none

    def image_size(self, data: DataConfig) -> int:
        """Side in pixels of the square images; InputError for one that cannot be rendered."""
        ...

    def open_source(self, data: DataConfig, split: str = "train") -> Any:
        """Random access to items: "image" uint8 (s, s, 3), "caption" and what labels need."""
        ...

    def make_items(self, data: DataConfig) -> Make:
        """The function that makes the items of a latent cache, with "time_ids"."""
        ...

    def captions(self, data: DataConfig) -> Iterator[str]:
        """The captions of the training split, without end."""
        ...

    def grid_prompts(self, count: int) -> list[str]:
        """Prompts of sample grids, none of which is trained on."""
        ...

    def collate_labels(self, items: Sequence[Item]) -> Batch:
        """Items as "image" (b, h, w, 3), "targets" and "known" (b, n)."""
        ...

    def collate_captions(self, items: Sequence[Item], tokenizer: Any) -> Batch:
        """The same with "ids" of the captions, and their "text_targets" and "text_known"."""
        ...


def procedural_dataset(kind: str) -> ProceduralDataset:
    """The data set of a `data.kind` in PROCEDURAL_KINDS."""
    return cast(ProceduralDataset, importlib.import_module(PROCEDURAL_KINDS[kind]))


def image_side(data: DataConfig, multiple: int = 1) -> int:
    """Side in pixels of rendered images; InputError unless it is a multiple of `multiple`."""
    side = procedural_dataset(data.kind).image_size(data)
    if side % multiple:
        raise InputError(
            f"data.resolution: got {side}, expected a multiple of {multiple}, the VAE's downscaling"
        )
    return side
