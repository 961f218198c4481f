"""What a training begins with: a UNet that is random among the parts of a pipeline, and folders."""

import dataclasses

import numpy as np
import pytest
import tiny
from tiny_training import OBJECTIVE

from jaxdiff.core.errors import InputError
from jaxdiff.experiments.base_model import check_initial_weights, load_base_model
from jaxdiff.experiments.training_methods import make_training_method
from jaxdiff.models.build import initial_weights, param_dict
from jaxdiff.training.config import DiffusionObjective, Full, TrainConfig

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.slow
@pytest.mark.parametrize("text_encoders", [False, True])
def test_only_the_unet_begins_at_random(tmp_path, text_encoders):
    folder = tiny.write_xl(tmp_path / "xl")
    train = Full(from_scratch=True, text_encoders=text_encoders)
    base = load_base_model(DiffusionObjective(pipeline=str(folder), trainable=train))
    networks, learnt = (
        base.abstract_networks(np.float32),
        make_training_method(base, np.float32, None).partition,
    )
    drawn = dict(learnt.init(3))
    prefix = "unet." if text_encoders else ""
    fresh = {f"{prefix}{path}": array for path, array in initial_weights(networks["unet"], 3)}
    stored = param_dict(base.pipeline.components["unet"].module)
    assert any(not np.array_equal(fresh[f"{prefix}{path}"], stored[path]) for path in stored)
    for path, array in fresh.items():
        np.testing.assert_array_equal(drawn.pop(path), array)
    for path, array in drawn.items():  # those of the text encoders are the pipeline's
        name, _, own = path.partition(".")
        np.testing.assert_array_equal(array, base.host_weights(name)[own])
    assert bool(drawn) == text_encoders


def test_a_scratch_without_a_pipeline_is_refused():
    with pytest.raises(InputError, match="from_scratch: got it without"):
        DiffusionObjective(vae="vae", text_encoder="text", trainable=Full(from_scratch=True))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, r"objective\.vae: .*vae.config\.json: got no such file"),
        ({"vae": "pixels"}, r"objective\.text_encoder: .*text_encoder.config\.json: got no such"),
    ],
)
def test_a_folder_that_is_missing_is_named_with_its_field(tmp_path, folders, message):
    names = {name: str(tmp_path / name) for name in ("vae", "text_encoder")}
    with pytest.raises(InputError, match=message):
        load_base_model(dataclasses.replace(OBJECTIVE, **names | folders))


def test_missing_initial_weights_are_named_with_their_field(tmp_path):
    config = TrainConfig(
        objective=dataclasses.replace(OBJECTIVE, weights=str(tmp_path)), steps=1, batch_size=1
    )
    with pytest.raises(InputError, match=r"objective\.weights: .*config\.json: got no such file"):
        check_initial_weights(config, resumed=False)
