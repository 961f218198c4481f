"""Networks that generate embeddings of images, or read them, trained from random weights."""

import dataclasses
import json
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned_images import write_folder

import jaxdiff
from jaxdiff.checkpoints.components import write_component
from jaxdiff.checkpoints.jsonfiles import write_object
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.experiments import priors
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.diffusion import diffusion_experiment, wire_diffusion
from jaxdiff.experiments.experiment import FILES, training_batches
from jaxdiff.experiments.training_methods import make_partition
from jaxdiff.families.image_embeddings import IMAGE_EMBEDS, NEGATIVE
from jaxdiff.models.build import with_params
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.models.clip_config import CLIPVisionConfig
from jaxdiff.models.prior.config import PriorTransformerConfig
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.training.config import DataConfig, DiffusionObjective, OptimiserConfig, TrainConfig
from jaxdiff.training.objectives.diffusion import LatentDiffusion
from jaxdiff.training.objectives.image_columns import columns_of_images

pytestmark = pytest.mark.usefixtures("standard_promotion")
WIDTH, SIDE = 8, 16
VISION = CLIPVisionConfig(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    projection_dim=WIDTH,
)
COSINE = VPSchedule(beta_schedule="squaredcos_cap_v2")
PRIOR = PriorTransformerConfig(
    num_attention_heads=2,
    attention_head_dim=4,
    num_layers=1,
    embedding_dim=WIDTH,
    num_embeddings=12,
)
DECODER = UNet2DConditionConfig(
    sample_size=8,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=8,
    attention_head_dim=2,
    encoder_hid_dim=WIDTH,
    encoder_hid_dim_type="image_proj",
    addition_embed_type="image",
    learned_variance=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    tiny.write_tiny(folder / "text")
    vision = tiny.random_component(CLIPVisionModel, VISION, seed=4, with_projection=True)
    write_component(folder / "clip", vision)
    write_object(folder / "clip" / "preprocessor_config.json", {"image_mean": [0.5] * 3})
    write_folder(folder / "images", 12, sizes=((SIDE, SIDE),))
    return folder


def prior(folder, **fields):
    own: dict[str, Any] = {"text_encoder": str(folder / "text"), "image_encoder": str(folder)}
    own |= {"schedule": COSINE, "prediction_type": "sample", "model": PRIOR}
    return DiffusionObjective(**own | fields)


def decoder(folder, **fields):
    own: dict[str, Any] = {
        "vae": str(folder / "text" / "vae"),
        "image_encoder": str(folder),
        "model": DECODER,
    }
    return DiffusionObjective(**own | fields)


def config(folder, objective, **fields):
    data = DataConfig(
        kind="folder",
        path=str(folder / "images"),
        resolution=SIDE,
        bucket_multiple=8,
        validation_size=4,
        cache_dir=str(folder / "cache"),
    )
    own: dict[str, Any] = {
        "steps": 2,
        "batch_size": 8,
        "log_every": 1,
        "sample_every": 2,
        "tensorboard": False,
    }
    own |= {"data": data, "optimiser": OptimiserConfig(learning_rate=1e-3, warmup_steps=0)}
    return TrainConfig(objective=objective, **own | fields)


@pytest.mark.slow
def test_a_prior_and_a_decoder_are_trained_and_generate_together(folder, monkeypatch):
    monkeypatch.setattr(priors, "NUM_MEASURED", 16)
    stages = []
    for name, objective in {"prior": prior(folder), "decoder": decoder(folder)}.items():
        short = dataclasses.replace(objective, sample_steps=2)
        result = jaxdiff.train(config(folder, short), folder / name, progress=False)
        assert np.isfinite(result.metrics["loss"])
        stages.append(jaxdiff.load(result.export, dtype="float32"))
    assert "validation_embedding_cosine" in result_of(folder / "prior")
    assert not (folder / "prior" / "samples").exists()
    assert (folder / "decoder" / "samples" / "step_000002.png").is_file()
    out = Cascade(*stages)("a star", seed=1, steps=2, output="numpy")
    assert out.images.shape == (1, SIDE, SIDE, 3)


def result_of(workdir):
    lines = (workdir / "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def model_of(base):
    partition = make_partition(base, jnp.float32)
    return LatentDiffusion(partition, base.objective.prediction_type)


def test_embeddings_are_those_of_the_images_and_of_an_image_of_zeros(folder):
    base = load_base_model(decoder(folder))
    model, images = model_of(base), jax.random.uniform(jax.random.key(1), (3, 8, 8, 3), minval=-1)
    table = base.read_weights("image_encoder")
    encoders = model.build_encoders({"image_encoder": table})
    make = cast(Any, columns_of_images(model.family, image_processor=base.image_processor))
    columns = make(encoders, {"image": images}, jax.random.key(0))
    encoder = with_params(base.networks["image_encoder"], table)
    std = jnp.asarray([0.26862954, 0.26130258, 0.27577711])[None, None, None]
    wanted = encoder(images / 2 / std).pooled
    np.testing.assert_allclose(columns[IMAGE_EMBEDS], wanted, atol=1e-5)
    zero = encoder(jnp.zeros((1, 8, 8, 3))).pooled
    np.testing.assert_allclose(columns[NEGATIVE], np.repeat(zero, 3, axis=0), atol=1e-5)
    cond = model.family.batch_conditioning(columns, jnp.asarray([False, True, False]))
    np.testing.assert_array_equal(cond[IMAGE_EMBEDS][0], columns[IMAGE_EMBEDS][0])
    np.testing.assert_array_equal(cond[IMAGE_EMBEDS][1], columns[NEGATIVE][1])


def test_a_prior_denoises_embeddings_normalised_by_those_of_the_data(folder, monkeypatch):
    monkeypatch.setattr(priors, "NUM_MEASURED", 16)
    base = load_base_model(prior(folder))
    training = config(folder, base.objective)
    partition = make_partition(base, jnp.float32)
    weights = dict(priors.with_statistics(partition, base, training).init(0))
    stream = training_batches(training, process_count=1)
    images = np.concatenate([next(stream)["image"] for _ in range(2)])
    stream.close()
    encoder = with_params(base.networks["image_encoder"], base.read_weights("image_encoder"))
    embeddings = np.asarray(encoder(cast(Any, base.image_processor)(jnp.asarray(images))).pooled)
    np.testing.assert_allclose(weights["clip_mean"], embeddings.mean(0)[None], atol=1e-5)
    np.testing.assert_allclose(weights["clip_std"], embeddings.std(0)[None], atol=1e-5)
    x0 = model_of(base).batch_latents(
        {"prior": weights}, {IMAGE_EMBEDS: jnp.asarray(embeddings)}, jax.random.key(0)
    )
    np.testing.assert_allclose(np.mean(x0, axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.std(x0, axis=0), 1, atol=1e-4)


def test_a_prior_of_other_schedules_is_refused(folder):
    with pytest.raises(InputError, match=r"objective\.schedule: got VPSchedule.* for a prior"):
        load_base_model(prior(folder, schedule=VPSchedule()))
    with pytest.raises(InputError, match=r"objective\.prediction_type: got 'v_prediction'"):
        load_base_model(prior(folder, prediction_type="v_prediction"))


def test_an_image_encoder_is_given_where_the_network_needs_one(folder):
    with pytest.raises(InputError, match=r"objective\.image_encoder: got none, expected it"):
        decoder(folder, image_encoder=None)
    with pytest.raises(InputError, match=r"objective\.vae: got x, expected it left out"):
        prior(folder, vae="x")
    with pytest.raises(InputError, match=r"objective\.image_encoder: got x, expected it left out"):
        decoder(folder, image_encoder="x", model=UNet2DConditionConfig(), text_encoder="y")
    pipeline = DiffusionObjective(pipeline=str(folder / "text"), image_encoder=str(folder))
    with pytest.raises(InputError, match=r"expected it left out: the network needs none"):
        load_base_model(pipeline)
    write_component(folder / "plain", tiny.random_component(CLIPVisionModel, VISION))
    with pytest.raises(InputError, match="got CLIPVisionModel without a projection"):
        load_base_model(decoder(folder, image_encoder=str(folder / "plain")))
    wide = dataclasses.replace(DECODER, encoder_hid_dim=16)
    with pytest.raises(InputError, match=r"image_encoder: got embeddings of width 8, expected 16"):
        load_base_model(decoder(folder, model=wide))


def test_the_cosine_is_that_of_the_angle_whatever_the_lengths():
    angles = np.linspace(0, np.pi, 20)
    made = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, 21)[:, None]
    inputs = {"made": made, "real": np.tile([3.0, 0.0], (20, 1))}
    found = priors.embedding_cosine(lambda x: x["made"], lambda x: x["real"], inputs)
    assert found == pytest.approx(np.cos(angles).mean(), abs=1e-6)
    near = priors.embedding_cosine(lambda x: x["real"], lambda x: x["real"], inputs)
    assert near == pytest.approx(1)


@pytest.mark.parametrize("given", [{"num_eval_images": 8}, {"eval_clip": "clip"}])
def test_a_prior_generates_no_images_to_evaluate(folder, tmp_path, given):
    training = config(folder, prior(folder, **given))
    with pytest.raises(InputError, match=rf"objective\.{next(iter(given))}: got .* for a prior"):
        diffusion_experiment(training, tmp_path, jnp.float32)


def test_cached_latents_have_no_images_to_embed(folder):
    objective = decoder(folder)
    cached = DataConfig(kind="latents", path=str(folder / "images"))
    with pytest.raises(InputError, match=r"data\.kind: got latents"):
        wire_diffusion(config(folder, objective, data=cached), jnp.float32, FILES)
