"""The VAE's loss: zero where it should be, its parts from their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.models.build import abstract, with_params
from jaxdiff.models.discriminator import PatchDiscriminatorConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig, sample_latents
from jaxdiff.training.config import VAEObjective
from jaxdiff.training.objectives.vae import (
    Frozen,
    edge_loss,
    kl_divergence,
    latent_moments,
    reconstruct,
    vae_task,
)

MODEL = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(4, 8),
    norm_num_groups=2,
    latent_channels=3,
)
OBJECTIVE = VAEObjective(
    model=MODEL, l1_weight=0.5, l2_weight=2.0, edge_weight=0.25, kl_weight=0.01
)
LEARNER = vae_task(OBJECTIVE)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return {path: jnp.asarray(array) for path, array in LEARNER.init(0)}


def test_divergence_of_a_standard_normal_is_zero():
    assert float(kl_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 3)))) == 0


def test_divergence_is_the_mean_log_ratio_of_densities():
    mean, logvar = jnp.full(200_000, 0.7), jnp.full(200_000, -0.4)
    z = np.asarray(
        sample_latents(mean, logvar, jax.random.normal(jax.random.key(1), mean.shape)), np.float64
    )
    log_ratio = 0.5 * (z**2 - (z - 0.7) ** 2 / np.exp(-0.4) + 0.4)
    error = 3 * log_ratio.std() / np.sqrt(log_ratio.size)
    assert abs(float(kl_divergence(mean, logvar)) - log_ratio.mean()) < error


def test_a_perfect_network_loses_nothing():
    assert float(edge_loss(IMAGES, IMAGES)) == 0


def test_edges_do_not_see_brightness_but_blur():
    assert float(edge_loss(IMAGES, IMAGES + 0.3)) < 1e-6
    # one bright column: a step of 1 on either side of it in each row
    line = jnp.zeros((1, 4, 4, 1)).at[:, :, 1].set(1.0)
    across = 2 * 4 / (4 * 3)
    np.testing.assert_allclose(edge_loss(line, jnp.zeros_like(line)), across / 2, rtol=1e-6)


def test_loss_is_the_weighted_sum_of_its_parts(params):
    value, parts = jax.jit(LEARNER.loss)(params, Frozen(), {"image": IMAGES}, jax.random.key(1))
    expected = 0.5 * parts["l1"] + 2 * parts["l2"] + 0.25 * parts["edge"] + 0.01 * parts["kl"]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_every_weight_learns(params):
    gradient = jax.jit(jax.grad(LEARNER.loss, has_aux=True))
    grads, _ = gradient(params, Frozen(), {"image": IMAGES}, jax.random.key(1))
    assert [name for name, g in grads.items() if not jnp.any(g)] == []


def test_latents_are_drawn_anew_with_each_key(params):
    loss = jax.jit(LEARNER.loss)
    first, second = (
        loss(params, Frozen(), {"image": IMAGES}, jax.random.key(k))[0] for k in (1, 2)
    )
    assert float(first) != float(second)


def test_moments_are_those_of_drawn_latents(params):
    model = with_params(abstract(AutoencoderKL, MODEL), params)
    mean, logvar = model.encode(IMAGES)
    noise = jax.random.normal(jax.random.key(0), (2000, *mean.shape))
    z = jax.vmap(lambda one: sample_latents(mean, logvar, one))(noise)
    first, second = latent_moments(model, IMAGES)
    np.testing.assert_allclose(first, z.mean(), atol=0.01)
    np.testing.assert_allclose(second, (z**2).mean(), rtol=0.02)


def test_reconstruction_goes_through_the_means(params):
    model = with_params(abstract(AutoencoderKL, MODEL), params)
    np.testing.assert_array_equal(reconstruct(model, IMAGES), model.decode(model.encode(IMAGES)[0]))


def test_computing_in_bfloat16_needs_no_implicit_promotion():
    half = vae_task(OBJECTIVE, jnp.bfloat16)
    value, _ = jax.eval_shape(
        half.loss, half.shapes, Frozen(), {"image": IMAGES}, jax.random.key(0)
    )
    assert value.dtype == jnp.float32


def test_weights_that_make_no_loss_are_refused():
    with pytest.raises(InputError, match=r"objective\.l1_weight: got 0 beside l2_weight 0"):
        VAEObjective(model=MODEL, l1_weight=0, l2_weight=0)
    with pytest.raises(InputError, match=r"objective\.kl_weight: got -1"):
        dataclasses.replace(OBJECTIVE, kl_weight=-1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_encoder": True}, r"freeze_encoder: got True without objective.weights"),
        (
            {"freeze_encoder": True, "weights": "a", "kl_weight": 0.5},
            r"kl_weight: got 0\.5, .* with",
        ),
        (
            {"perceptual_weight": 2.0},
            r"perceptual_weight: got 2\.0 without",
        ),
        ({"perceptual_model": "a", "perceptual_weight": 0.0}, r"perceptual_weight: got 0\.0"),
        ({"adversarial_weight": -0.5}, r"adversarial_weight: got -0\.5"),
        ({"adversarial_start": 5}, r"adversarial_start: got 5 without"),
        ({"adversarial_weight": 1.0, "adversarial_start": -1}, r"adversarial_start: got -1"),
        (
            {"adversarial_adaptive": False},
            r"adversarial_adaptive: got False without",
        ),
        ({"discriminator": PatchDiscriminatorConfig(width=8)}, r"discriminator: got PatchDisc"),
    ],
    ids=str,
)
def test_fields_that_would_be_ignored_are_refused(fields, message):
    with pytest.raises(InputError, match=rf"objective\.{message}"):
        VAEObjective(model=MODEL, **fields)
    VAEObjective(model=MODEL, freeze_encoder=True, weights="a", kl_weight=0.0)
