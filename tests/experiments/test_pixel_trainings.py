"""Networks of pixels that begin at random, alone and as stages of a cascade."""

import dataclasses
from typing import Any

import cascade_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned_images import write_folder

import jaxdiff
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.checkpoints.safetensors import read_table, read_tensor
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.sample_grid import sampling_inputs
from jaxdiff.families.low_resolution import resize_bilinear
from jaxdiff.models.dit.config import DiTTransformer2DConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.training.config import (
    DataConfig,
    DiffusionObjective,
    DistillationObjective,
    LoRA,
    OptimiserConfig,
    TrainConfig,
)
from jaxdiff.training.objectives.image_columns import low_resolution_columns

pytestmark = pytest.mark.usefixtures("standard_promotion")
COSINE = VPSchedule(beta_schedule="squaredcos_cap_v2")
BASE = UNet2DConditionConfig(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 8),
    norm_num_groups=4,
    cross_attention_dim=8,
    attention_head_dim=4,
    layers_per_block=1,
)
ENLARGING = dataclasses.replace(BASE, sample_size=16, in_channels=6, class_embed_type="timestep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    tiny.write_tiny(folder / "text")
    write_folder(folder / "images", 12, sizes=((16, 16),))
    return folder


def objective(folder, model=BASE, **fields):
    own = {"vae": "pixels", "text_encoder": str(folder / "text"), "schedule": COSINE}
    return DiffusionObjective(model=model, **own | fields)


def config(folder, made, resolution):
    data = DataConfig(
        kind="folder",
        path=str(folder / "images"),
        resolution=resolution,
        bucket_multiple=8,
        validation_size=4,
        cache_dir=str(folder / "cache"),
    )
    small = OptimiserConfig(learning_rate=1e-3, warmup_steps=0)
    shown = {"log_every": 1, "sample_every": 2, "tensorboard": False}
    return TrainConfig(objective=made, data=data, optimiser=small, steps=2, batch_size=8, **shown)


@pytest.mark.slow
def test_a_cascade_is_trained_stage_by_stage_and_generates(folder):
    first = objective(folder, sample_steps=2)
    second = objective(folder, ENLARGING, sample_steps=2, enlargement=2)
    stages = []
    for name, made, side in (("first", first, 8), ("second", second, 16)):
        result = jaxdiff.train(config(folder, made, side), folder / name, progress=False)
        assert np.isfinite(result.metrics["loss"])
        assert (folder / name / "samples" / "step_000002.png").is_file()
        stages.append(jaxdiff.load(result.export, dtype="float32"))
    assert [pipe.defaults.clipping for pipe in stages] == ["clip-sample:limit=1.0"] * 2
    assert [pipe.family.enlarges for pipe in stages] == [False, True]
    out = Cascade(*stages)("a star", seed=1, steps=2, output="numpy")
    assert out.images.shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_a_lora_of_attention_with_added_keys(folder, tmp_path):
    """DeepFloyd IF's: by default those of the image and of the text are changed."""
    write_pipeline(tmp_path / "if", cascade_files.first(tmp_path / "of"))
    made = DiffusionObjective(pipeline=str(tmp_path / "if"), trainable=LoRA(rank=2), sample_steps=2)
    result = jaxdiff.train(config(folder, made, 8), tmp_path / "run", progress=False)
    file = result.export / "pytorch_lora_weights.safetensors"
    end = ".lora_B.weight"  # which is zero at first
    ups = {name: entry for name, entry in read_table(file).items() if name.endswith(end)}
    found = {name.removesuffix(end): read_tensor(entry) for name, entry in ups.items()}
    changed = {name.split("attentions.0.")[-1] for name, up in found.items() if np.any(up)}
    projections = {"to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"}
    assert projections <= changed
    pipe = tiny.first_devices(jaxdiff.load(tmp_path / "if", dtype="float32"), 1)
    call = {"seed": 1, "steps": 2, "output": "latent"}
    before = pipe("a star", **call).images
    pipe.load_lora(file, 100.0)
    assert np.abs(pipe("a star", **call).images - before).max() > 1e-3


def test_a_stage_is_trained_on_smaller_images_with_as_much_noise_as_it_is_told(folder):
    base = load_base_model(objective(folder, ENLARGING, enlargement=2))
    images = jax.random.uniform(jax.random.key(1), (64, 16, 16, 3), minval=-1)
    columns = low_resolution_columns(images, 2, (16, 16), jax.random.key(2))
    means = images.reshape(64, 8, 2, 8, 2, 3).mean((2, 4))
    np.testing.assert_allclose(columns["low_resolution"], means, atol=1e-6)
    cond: dict[str, Any] = {
        extra.argument: extra.of_batch(columns, jnp.zeros(64, bool)) for extra in base.family.extras
    }
    levels = cond["class_labels"]
    assert 0 <= levels.min() < 150
    assert 850 < levels.max() <= 999
    alpha, sigma = COSINE.alpha_sigma(levels)
    shape = (64, 1, 1, 1)
    clean = resize_bilinear(np.asarray(means), (16, 16))
    wanted = alpha.reshape(shape) * clean + sigma.reshape(shape) * columns["low_resolution_noise"]
    np.testing.assert_allclose(cond["channels"], wanted, atol=1e-5)


def test_columns_do_not_depend_on_the_batch():
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))
    keys = jax.random.split(jax.random.key(5), 4)
    whole = low_resolution_columns(images, 4, (8, 8), keys)
    part = low_resolution_columns(images[2:], 4, (8, 8), keys[2:])
    for name, column in part.items():
        np.testing.assert_array_equal(column, whole[name][2:])
    with pytest.raises(InputError, match="enlargement: got 3, expected a divisor of the sides 8x8"):
        low_resolution_columns(images, 3, (8, 8), keys)


def test_grids_enlarge_real_images_with_the_noise_that_the_model_asks_for(folder):
    base = load_base_model(objective(folder, ENLARGING, enlargement=2))
    images = np.zeros((3, 16, 16, 3), np.float32)
    inputs = sampling_inputs(base, 16, 3, lambda: images)
    assert inputs["low_resolution"].shape == (3, 8, 8, 3)
    inputs = {name: jnp.asarray(column) for name, column in inputs.items()}
    levels = base.family.extras[1].of_batch(inputs, jnp.zeros(3, bool))
    np.testing.assert_array_equal(levels, 250)
    text_only = load_base_model(objective(folder))
    assert set(sampling_inputs(text_only, 8, 3, pytest.fail)) == {"noise", "time_ids"}


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (dataclasses.replace(BASE, in_channels=4), {}, "unet: got 4 channels in and 3 out"),
        (
            dataclasses.replace(ENLARGING, class_embed_type=None),
            {},
            "an embedding of the noise",
        ),
        (dataclasses.replace(BASE, cross_attention_dim=16), {}, "width 8, expected 16"),
        (BASE, {"enlargement": 2}, "enlargement: got 2 for pixels with CLIP, expected it left out"),
        (BASE, {"enlargement": 1}, "objective.enlargement: got 1, expected a number from 2 to 64"),
    ],
)
def test_networks_that_are_no_stage_are_refused(folder, model, fields, message):
    with pytest.raises(InputError, match=message):
        load_base_model(objective(folder, model, **fields))


def test_a_network_that_knows_no_pixels_is_refused(folder):
    with pytest.raises(InputError, match=r"objective\.vae: got pixels for a DiT"):
        load_base_model(
            DiffusionObjective(
                vae="pixels",
                model=DiTTransformer2DConfig(),
                schedule=FlowSchedule(),
                prediction_type="flow_prediction",
            )
        )


def test_a_teacher_that_enlarges_is_refused(folder, tmp_path):
    write_pipeline(tmp_path / "second", cascade_files.second(tmp_path / "of"))
    made = DistillationObjective(teacher=str(tmp_path / "second"))
    with pytest.raises(InputError, match=r"objective\.teacher: got a network that enlarges images"):
        jaxdiff.train(config(folder, made, 16), tmp_path / "run", progress=False)
