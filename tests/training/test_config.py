"""Configs refuse what cannot be trained, and know what must not change on the way."""

import dataclasses
import json

import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.experiments.procedural import image_side
from jaxdiff.models.clip_config import CLIPTextConfig
from jaxdiff.models.vae import AutoencoderKLConfig
from jaxdiff.training.config import (
    ClassifierObjective,
    CLIPObjective,
    DataConfig,
    DiffusionObjective,
    DistillationObjective,
    EMAConfig,
    LoRA,
    MeshConfig,
    OptimiserConfig,
    TrainConfig,
    VAEObjective,
    resume_identity,
)

CONFIG = TrainConfig(objective=VAEObjective(), steps=10, batch_size=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": -1},
        {"log_every": 0},
        {"checkpoint_every": 0},
        {"sample_every": -1},
        {"max_checkpoints": 0},
        {"seed": -1},
        {"dtype": "float8"},
        {"data": DataConfig(variations=8)},
        {"max_nonfinite_steps": 0},
        {"gradient_accumulation_steps": 0},
        {"gradient_accumulation_steps": 3},
        {
            "gradient_accumulation_steps": 2,
            "objective": CLIPObjective(text=CLIPTextConfig(vocab_size=300)),
        },
    ],
    ids=str,
)
def test_impossible_trainings_are_refused(changes):
    with pytest.raises(InputError, match="got"):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("objective", "remat"),
    [
        (VAEObjective(), None),
        (DiffusionObjective(pipeline="here"), "none"),
        (DiffusionObjective(pipeline="here", trainable=LoRA(), remat="blocks"), "blocks"),
        (DistillationObjective(teacher="here", remat="blocks"), "blocks"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_weights_are_gathered_again_only_between_blocks(objective, remat):
    assert getattr(objective, "remat", None) == remat
    with pytest.raises(InputError, match=r"mesh\.reshard_after_forward: got true, expected a Diff"):
        dataclasses.replace(
            CONFIG, objective=objective, mesh=MeshConfig(fsdp=8, reshard_after_forward=True)
        )


def test_weights_that_are_not_shared_are_not_gathered_again():
    with pytest.raises(InputError, match=r"reshard_after_forward: got true with mesh\.fsdp 1"):
        MeshConfig(data=8, reshard_after_forward=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"epsilon": 0.0},
        {"weight_decay": -1.0},
        {"warmup_steps": -1},
        {"decay": "exponential"},
        {"decay_fraction": 1.5},
        {"min_lr_ratio": -0.5},
        {"clip_norm": 0.0},
    ],
    ids=str,
)
def test_impossible_optimisers_are_refused(changes):
    (name,) = changes
    with pytest.raises(InputError, match=rf"optimiser\.{name}: got"):
        OptimiserConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"decay": 1.1},
        {"power_stds": (0.05,), "snapshot_every": 10},
        {"power_stds": (0.05, 0.05), "snapshot_every": 10},
        {"power_stds": (0.05, 0.5), "snapshot_every": 10},
        {"power_stds": (0.05, 0.1)},
        {"snapshot_every": 10},
    ],
    ids=str,
)
def test_impossible_averages_are_refused(changes):
    with pytest.raises(InputError, match=r"ema\.\w+: got"):
        EMAConfig(**changes)


def test_variations_fill_a_validation_batch():
    with pytest.raises(InputError, match=r"data\.variations: got 3, expected one of 1, 2, 4, 8"):
        DataConfig(variations=3)


def test_a_number_of_scenes_is_for_caches_alone():
    data = DataConfig(num_scenes=10)
    with pytest.raises(InputError, match=r"data\.num_scenes: got 10, expected it left out"):
        dataclasses.replace(CONFIG, data=data)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (16, "got 16, expected a number from 32 to 1024"),
        (100, "got 100, expected a multiple of 16"),
    ],
)
def test_scenes_have_a_size_that_the_vae_divides(side, message):
    with pytest.raises(InputError, match=rf"data\.resolution: {message}"):
        image_side(DataConfig(resolution=side), 16)
    assert image_side(DataConfig()) == 64
    assert image_side(DataConfig(resolution=128), 16) == 128


def test_identity_is_the_model_and_the_seed():
    other = dataclasses.replace(
        CONFIG,
        objective=VAEObjective(kl_weight=1.0),
        steps=99,
        optimiser=OptimiserConfig(learning_rate=1.0),
    )
    assert resume_identity(other) == resume_identity(CONFIG)
    assert resume_identity(dataclasses.replace(CONFIG, seed=1)) != resume_identity(CONFIG)
    wider = VAEObjective(model=AutoencoderKLConfig(block_out_channels=(96,)))
    changed = resume_identity(dataclasses.replace(CONFIG, objective=wider))
    before = resume_identity(CONFIG)
    assert [n for n in before if before[n] != changed[n]] == ["objective.model.block_out_channels"]


def test_identity_of_every_objective_is_json():
    for objective in (
        VAEObjective(),
        CLIPObjective(text=CLIPTextConfig(vocab_size=300)),
        ClassifierObjective(vae="a"),
        DiffusionObjective(vae="a", text_encoder="b"),
    ):
        values = resume_identity(dataclasses.replace(CONFIG, objective=objective))
        assert values["objective"] == type(objective).__name__
        assert json.loads(json.dumps(values)).keys() == values.keys()
    assert "objective.prediction_type" in values
