"""Guidance distillation: the student begins as its teacher and learns the guided output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_training import OBJECTIVE, TEXT, VAE, networks
from tiny_training import frozen as frozen_encoders

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.losses import add_noise
from jaxdiff.families.stable_diffusion import SD, SDXL, SizesAndCrop
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.nn.embeddings import guidance_embedding
from jaxdiff.training.config import DistillationObjective, TimestepSampling
from jaxdiff.training.objectives.diffusion import (
    LatentDiffusion,
    encode_latents,
    sample_timesteps,
    train_denoiser,
)
from jaxdiff.training.objectives.distillation import (
    distillation_task,
    student_model,
    student_network,
)
from jaxdiff.training.step import per_sample_normal, per_sample_split

RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.uniform(-1, 1, size=(4, 8, 8, 3)), jnp.float32),
    "ids": jnp.asarray(RNG.integers(0, 18, size=(4, 5)), jnp.int32),
}
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def teacher():
    """A UNet without the zeros of a fresh one."""
    return tiny.random_component(UNet2DConditionModel, OBJECTIVE.model, seed=2).module


@pytest.fixture(scope="module")
def frozen(teacher):
    encoders = frozen_encoders()
    return encoders._replace(weights=encoders.weights | {"unet": param_dict(teacher)})


def learner(teacher, **options):
    config = DistillationObjective(teacher="", guidance_embedding_dim=6, **options)
    pretrained = {"unet": param_dict(teacher)}
    parts = networks() | {"unet": teacher}
    model = student_model(config, SD, parts, "v_prediction", pretrained=lambda: pretrained)
    of_teacher = LatentDiffusion(train_denoiser(SD, parts), "v_prediction")
    return distillation_task(config, of_teacher, model, OBJECTIVE.schedule)


def first(learner):
    return {path: jnp.asarray(array) for path, array in learner.init(0)}


def test_the_student_begins_as_the_conditional_teacher(teacher):
    params = first(learner(teacher))
    pupil = with_params(student_network(teacher, 6), params)
    x = jnp.asarray(RNG.normal(size=(3, 4, 4, 2)), jnp.float32)
    t, context = jnp.array([1.0, 500.0, 999.0]), jnp.ones((3, 5, 8))
    told = guidance_embedding(jnp.array([1.0, 3.0, 9.0]), 6)
    initial = jax.jit(lambda x: pupil(x, t, context, timestep_cond=told))(x)
    np.testing.assert_array_equal(initial, jax.jit(lambda x: teacher(x, t, context))(x))


def test_at_scale_one_there_is_nothing_to_learn(teacher, frozen):
    made = learner(teacher, guidance_scale_range=(1.0, 1.0))
    loss, measures = jax.jit(made.loss)(first(made), frozen, BATCH, KEY)
    assert float(loss) < 1e-10
    assert float(measures["relative_error"]) < 1e-8


def test_the_error_is_that_to_the_guided_teacher(teacher, frozen):
    """By hand, from the same keys: (w - 1)^2 |cond - uncond|^2, for the student begins at cond."""
    made, w = learner(teacher, guidance_scale_range=(4.0, 4.0)), 4.0
    loss, _ = jax.jit(made.loss)(first(made), frozen, BATCH, KEY)

    @jax.jit
    def expected():
        latent_key, _, time_key, noise_key = per_sample_split(KEY, 4, 4)
        vae = with_params(abstract(AutoencoderKL, VAE), frozen.weights["vae"])
        x0 = encode_latents(vae, BATCH["image"], latent_key)
        t = sample_timesteps(time_key, (4,), 1000, TimestepSampling())
        alpha, sigma = OBJECTIVE.schedule.alpha_sigma(t)
        x = add_noise(x0, per_sample_normal(noise_key, x0.shape), alpha, sigma)
        read = with_params(abstract(CLIPTextModel, TEXT), frozen.weights["text_encoder"])
        cond = teacher(x, t, read(BATCH["ids"]))
        uncond = teacher(x, t, read(jnp.tile(frozen.null["text_encoder"][None], (4, 1))))
        return (w - 1) ** 2 * jnp.mean(jnp.square(cond - uncond))

    np.testing.assert_allclose(loss, expected(), rtol=1e-4)


def test_the_scale_is_learnt_and_the_teacher_is_not(teacher, frozen):
    made = learner(teacher, guidance_scale_range=(2.0, 8.0))
    gradient = jax.grad(lambda p, f: made.loss(p, f, BATCH, KEY)[0], (0, 1), allow_int=True)
    of_student, of_teacher = jax.jit(gradient)(first(made), frozen)
    assert np.abs(of_student["time_embedding.cond_proj.kernel"]).max() > 0
    for path, gradient in of_teacher.weights["unet"].items():
        assert not np.any(gradient), path


@pytest.mark.parametrize("zero_uncond", [True, False])
def test_sdxl_is_distilled_with_all_of_its_conditioning(zero_uncond):
    """By hand, as above; the null caption is zeros or the empty text, its sizes the image's."""
    second = dataclasses.replace(TEXT, hidden_size=6, projection_dim=10)
    fields = {
        "cross_attention_dim": 8 + 6,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 10 + 6 * 4,
    }
    unet = dataclasses.replace(OBJECTIVE.model, **fields)
    teacher = tiny.random_component(UNet2DConditionModel, unet, seed=2).module
    reader = tiny.random_component(CLIPTextModel, second, with_projection=True, seed=3).module
    first = with_params(abstract(CLIPTextModel, TEXT), frozen_encoders().weights["text_encoder"])
    config = DistillationObjective(
        teacher="", guidance_embedding_dim=6, guidance_scale_range=(4.0, 4.0)
    )
    parts = networks() | {"unet": teacher, "text_encoder_2": reader}
    pretrained = {"unet": param_dict(teacher)}
    family = dataclasses.replace(SDXL, zero_uncond=zero_uncond)
    model = student_model(config, family, parts, "epsilon", pretrained=lambda: pretrained)
    of_teacher = LatentDiffusion(train_denoiser(family, parts), "epsilon")
    made = distillation_task(config, of_teacher, model, OBJECTIVE.schedule)
    given = frozen_encoders()
    weights = {**given.weights, "unet": param_dict(teacher), "text_encoder_2": param_dict(reader)}
    null = given.null | {"text_encoder_2": given.null["text_encoder"]}
    batch = BATCH | {"ids_2": BATCH["ids"]}
    params = {path: jnp.asarray(array) for path, array in made.init(0)}
    loss, _ = jax.jit(made.loss)(params, given._replace(weights=weights, null=null), batch, KEY)

    @jax.jit
    def expected():
        latent_key, _, time_key, noise_key = per_sample_split(KEY, 4, 4)
        vae = with_params(abstract(AutoencoderKL, VAE), weights["vae"])
        x0 = encode_latents(vae, batch["image"], latent_key)
        t = sample_timesteps(time_key, (4,), 1000, TimestepSampling())
        noise = per_sample_normal(noise_key, x0.shape)
        x = add_noise(x0, noise, *OBJECTIVE.schedule.alpha_sigma(t))

        def output(ids, factor):
            read = [
                encoder.features(row) for encoder, row in zip((first, reader), ids, strict=True)
            ]
            context = factor * jnp.concatenate([f.penultimate for f in read], axis=-1)
            sizes = SizesAndCrop().of_batch(batch, jnp.zeros(4, bool))
            return teacher(x, t, context, text_embeds=factor * read[-1].pooled, time_ids=sizes)

        empty = jnp.tile(null["text_encoder"][None], (4, 1))
        cond = output([BATCH["ids"]] * 2, 1.0)
        uncond = output([empty] * 2, 0.0 if zero_uncond else 1.0)
        return 9 * jnp.mean(jnp.square(cond - uncond))

    np.testing.assert_allclose(loss, expected(), rtol=1e-4)


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_blocks_are_computed_again_where_asked(teacher, frozen, remat):
    made = learner(teacher, remat=remat)
    program = jax.make_jaxpr(jax.grad(lambda p: made.loss(p, frozen, BATCH, KEY)[0]))(made.shapes)
    assert ("remat" in str(program)) == (remat == "blocks")


@pytest.mark.slow
def test_what_is_computed_again_is_the_same_loss(teacher, frozen):
    plain, again = (learner(teacher, remat=remat) for remat in ("none", "blocks"))
    params = first(plain)
    values = [jax.jit(made.loss)(params, frozen, BATCH, KEY)[0] for made in (plain, again)]
    np.testing.assert_allclose(*values, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guidance_scale_range": (3.0, 2.0)},
            "objective.guidance_scale_range: got 2.0, expected a number from 3.0",
        ),
        ({"guidance_scale_range": (-1.0, 2.0)}, "objective.guidance_scale_range: got -1.0"),
        ({"guidance_embedding_dim": 0}, "objective.guidance_embedding_dim: got 0"),
        ({"remat": "all"}, "objective.remat: got 'all'"),
    ],
)
def test_bad_objectives_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DistillationObjective(teacher="", **options)
