"""Data sets that a program renders have all that trainings ask of them."""

import importlib

import pytest

from jaxdiff.experiments.procedural import EMBEDDED_DATA, ProceduralDataset, procedural_dataset
from jaxdiff.training.config import PROCEDURAL_KINDS, DataConfig, data_fields


@pytest.mark.parametrize("kind", PROCEDURAL_KINDS)
def test_the_module_of_each_kind_is_a_data_set(kind):
    dataset = procedural_dataset(kind)
    assert dataset is importlib.import_module(PROCEDURAL_KINDS[kind])
    assert isinstance(dataset, ProceduralDataset)
    data = DataConfig(kind=kind)
    item = dataset.open_source(data)[0]
    assert item["image"].shape == (dataset.image_size(data),) * 2 + (3,)
    assert next(dataset.captions(data)) == item["caption"]
    dataset.prompt_grammar.check(dataset.labels)
    assert {name for slot in dataset.label_slots for name in slot} <= set(dataset.labels.slices)


def test_the_kinds_are_known():
    assert PROCEDURAL_KINDS.keys() < data_fields().keys()
    assert EMBEDDED_DATA in PROCEDURAL_KINDS
