"""The denoising loss: zero for perfect networks, dropped captions, draws for each sample."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from tiny import LinearUNet
from tiny_training import OBJECTIVE, networks

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.denoising import PREDICTION_TYPES, target
from jaxdiff.diffusion.losses import WEIGHTINGS
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.families.stable_diffusion import SD, SizesAndCrop
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.nn.remat import REMAT
from jaxdiff.training.config import TimestepSampling
from jaxdiff.training.objectives.diffusion import (
    denoising_losses,
    diffusion_task,
    drop_captions,
    offset_noise,
    sample_timesteps,
    train_denoiser,
)
from jaxdiff.training.objectives.timestep_quartiles import loss_by_timestep_quartile
from jaxdiff.training.step import accumulate_gradients, per_sample_normal

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def frozen():
    return tiny_training.frozen()


def learner(unet=LinearUNet, **changes):
    config = dataclasses.replace(OBJECTIVE, **changes)
    return diffusion_task(config, train_denoiser(SD, networks(config, unet=unet)))


def scattered(learn):
    """Initial weights with noise: layers that begin at zero would hide the others."""
    return {path: jnp.asarray(array) + 0.1 * normal(*array.shape) for path, array in learn.init(2)}


def batch(b=3):
    ids = np.full((b, 5), 19)
    ids[:, 0], ids[:, 1] = 18, np.arange(b)
    return {"image": jnp.tanh(normal(b, 8, 8, 3)), "ids": jnp.asarray(ids)}


def test_each_encoder_loses_captions_of_its_own_beside_those_that_all_lose():
    n, rate, each = 4000, 0.2, (0.0, 0.5)
    texts = {name: jnp.full((n, 3), i + 1, jnp.int32) for i, name in enumerate("ab")}
    null = {name: jnp.zeros(3, jnp.int32) for name in texts}
    read, dropped = drop_captions(jax.random.key(1), texts, null, rate, each)
    for i in range(2):
        expected = np.where(dropped[i][:, None], 0, np.full((n, 3), i + 1))
        np.testing.assert_array_equal(read[i], expected)
    first, second = (np.asarray(each) for each in dropped)
    assert not (first & ~second).any()  # what all lose the second loses too
    alone = second[~first].mean()
    assert abs(first.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
    assert abs(alone - 0.5) < 4 * np.sqrt(0.25 / (n * (1 - rate)))


def test_without_rates_of_their_own_encoders_lose_the_same_captions():
    texts = {name: jnp.ones((50, 3), jnp.int32) for name in "ab"}
    null = {name: jnp.zeros(3, jnp.int32) for name in texts}
    _, (first, second) = drop_captions(jax.random.key(1), texts, null, 0.5)
    np.testing.assert_array_equal(first, second)
    assert 0 < first.sum() < 50


def test_images_without_recorded_sizes_are_whole():
    kept = jnp.zeros(2, bool)
    told = SizesAndCrop().of_batch({"image": jnp.zeros((2, 16, 24, 3))}, kept)
    np.testing.assert_array_equal(told, [[16, 24, 0, 0, 16, 24]] * 2)
    recorded = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(SizesAndCrop().of_batch({"time_ids": recorded}, kept), recorded)


@pytest.mark.parametrize("kind", sorted(PREDICTION_TYPES))
@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
def test_a_perfect_network_loses_nothing(kind, weighting):
    config = dataclasses.replace(OBJECTIVE, prediction_type=kind, weighting=weighting)
    x0, eps, t = normal(4, 4, 4, 2), normal(4, 4, 4, 2), jnp.asarray([0, 5, 500, 999])
    alpha, sigma = config.schedule.alpha_sigma(t)
    seen = []

    def perfect(x, times):
        seen.append((x, times))
        return target(kind, x0, eps, alpha, sigma)

    errors = denoising_losses(config, perfect, x0, t, eps).error
    np.testing.assert_allclose(errors, 0, atol=1e-11 if kind == "score" else 0)
    (x, times), a, s = seen[0], alpha[:, None, None, None], sigma[:, None, None, None]
    np.testing.assert_allclose(x, a * x0 + s * eps, rtol=1e-6)
    np.testing.assert_array_equal(times, t)


def test_captions_are_dropped_one_by_one_at_the_given_rate():
    n, rate = 4000, 0.1
    ids = jnp.ones((n, 5), jnp.int32)
    null = jnp.zeros(5, jnp.int32)
    (after,), (dropped,) = drop_captions(jax.random.key(3), {"a": ids}, {"a": null}, rate)
    np.testing.assert_array_equal(after, np.where(dropped[:, None], null[None], ids))
    assert abs(int(dropped.sum()) - n * rate) < 3 * np.sqrt(n * rate * (1 - rate))
    # independent: neighbours are both dropped at the squared rate
    both = int((dropped[:-1] & dropped[1:]).sum())
    assert abs(both - n * rate**2) < 4 * np.sqrt(n * rate**2)


# The quartile of how times are drawn: sigmoid(-0.6745) is 0.3374; 4 (0.25) / (1 + 3 (0.25)) is 4/7.
@pytest.mark.parametrize(
    ("how", "shift", "quartile"),
    [("uniform", 1, 0.25), ("logit_normal", 1, 0.3374), ("uniform", 4, 4 / 7)],
)
def test_times_cover_the_levels(how, shift, quartile):
    sampling = TimestepSampling(timestep_sampling=how, timestep_shift=shift)
    t = np.asarray(sample_timesteps(jax.random.key(0), (20_000,), 100, sampling))
    assert t.min() >= 0
    assert t.max() <= 99
    assert len(np.unique(t)) > 95
    assert abs(np.mean(t < 100 * quartile) - 0.25) < 0.02


def test_frozen_weights_get_no_gradient_and_all_others_do(frozen):
    learn = learner(UNet2DConditionModel)
    params = scattered(learn)
    told = batch()

    def loss(ours, theirs):
        return learn.loss(ours, frozen._replace(weights=theirs), told, jax.random.key(0))[0]

    ours, theirs = jax.jit(jax.grad(loss, (0, 1)))(params, frozen.weights)
    assert [name for name, g in ours.items() if not jnp.any(g)] == []
    assert not any(jnp.any(g) for g in jax.tree.leaves(theirs))


def test_with_every_caption_dropped_captions_do_not_matter(frozen):
    learn = learner(caption_dropout=1.0)
    params = scattered(learn)
    one = batch()
    other = one | {"ids": one["ids"][::-1]}
    loss = jax.jit(learn.loss)
    first, second = (loss(params, frozen, b, jax.random.key(0))[0] for b in (one, other))
    assert float(first) == float(second)
    told = jax.jit(learner(caption_dropout=0.0).loss)
    first, second = (told(params, frozen, b, jax.random.key(0))[0] for b in (one, other))
    assert float(first) != float(second)


def test_an_untrained_network_loses_the_variance_of_its_target(frozen):
    learn = learner(UNet2DConditionModel, prediction_type="epsilon")
    params = {path: jnp.asarray(array) for path, array in learn.init(2)}
    many = batch(256)
    value, _ = jax.jit(learn.loss)(params, frozen, many, jax.random.key(0))
    # the output is 0 at first, so the loss is the mean square of 256 * 4 * 4 * 2 normal draws
    assert abs(float(value) - 1) < 4 * np.sqrt(2 / (256 * 32))


def test_computing_in_bfloat16_needs_no_implicit_promotion(frozen):
    learn = diffusion_task(OBJECTIVE, train_denoiser(SD, networks(dtype=jnp.bfloat16)))
    value, _ = jax.eval_shape(learn.loss, learn.shapes, frozen, batch(), jax.random.key(0))
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in learn.shapes.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction_type", "v"),
        ("weighting", "snr"),
        ("timestep_sampling", "normal"),
        ("logit_mean", 0.5),
        ("logit_std", 0.5),
        ("mode_scale", 0.5),
        ("timestep_shift_by_resolution", True),
        ("caption_dropout", 1.5),
        ("snr_gamma", 0.0),
        ("noise_offset", -0.1),
        ("remat", "all"),
        ("sample_steps", 0),
    ],
)
def test_impossible_choices_are_refused(field, value):
    with pytest.raises(InputError, match=rf"objective\.{field}: got"):
        dataclasses.replace(OBJECTIVE, **{field: value})


def test_eps_is_not_learnt_where_nothing_is_left_of_the_image():
    schedule = VPSchedule(zero_terminal_snr=True)
    assert float(schedule.alpha_sigma(jnp.asarray([999]))[0][0]) == 0
    dataclasses.replace(OBJECTIVE, schedule=schedule)
    for kind in ("epsilon", "score"):
        with pytest.raises(InputError, match=f"prediction_type: got {kind} for a schedule"):
            dataclasses.replace(OBJECTIVE, schedule=schedule, prediction_type=kind)


def test_offset_noise_has_its_two_variances():
    amount, n = 0.5, 4000
    eps = np.asarray(offset_noise(jax.random.key(0), (n, 4, 4, 2), amount), np.float64)
    means = eps.mean((1, 2))
    # of a channel's mean: amount^2 of the offset and 1/16 of what is averaged; 2n draws of each
    expected = amount**2 + 1 / 16
    assert abs(means.var() / expected - 1) < 4 * np.sqrt(2 / (2 * n))
    within = (eps - means[:, None, None]).var() * 16 / 15
    assert abs(within - 1) < 4 * np.sqrt(2 / (30 * n))
    plain = offset_noise(jax.random.key(0), (n, 4, 4, 2), 0.0)
    np.testing.assert_array_equal(plain, per_sample_normal(jax.random.key(0), (n, 4, 4, 2)))


def test_errors_by_quarter_of_the_levels():
    t = jnp.asarray([0, 249, 250, 999, 750])
    found = loss_by_timestep_quartile(jnp.asarray([1.0, 3.0, 5.0, 7.0, 8.0]), t, 1000)
    assert {name: float(value) for name, value in found.items()} == {
        "loss_q1": 2.0,
        "loss_q2": 5.0,
        "loss_q3": 0.0,
        "loss_q4": 7.5,
    }


def test_the_measure_is_the_loss_and_its_quarters(frozen):
    learn = learner()
    params, told = scattered(learn), batch(16)
    found = jax.jit(learn.eval_metrics)(params, frozen, told, jax.random.key(0))
    loss, _ = jax.jit(learn.loss)(params, frozen, told, jax.random.key(0))
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-6)
    assert set(found) == {"loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"}


@pytest.fixture(scope="module")
def gradients(frozen):
    """The gradients of a UNet, computed again as told, and whether that shows in the program."""
    params, told = scattered(learner(UNet2DConditionModel)), batch()

    @functools.cache
    def gradients(remat):
        learn = learner(UNet2DConditionModel, remat=remat)

        def loss(p):
            return learn.loss(p, frozen, told, jax.random.key(0))[0]

        traced = jax.jit(jax.grad(loss)).trace(params)
        # as it is traced: a compiler without need of memory may undo it
        return traced.lower().compile()(params), "remat" in str(traced.jaxpr)

    return gradients


@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"none"}))
def test_what_is_computed_again_is_the_same_number(gradients, remat):
    (expected, one), (found, other) = gradients("none"), gradients(remat)
    assert (one, other) == (False, True)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(frozen, parts):
    learn = learner(noise_offset=0.1)
    params, told, key = scattered(learn), batch(8), jax.random.key(5)
    gradient = jax.value_and_grad(learn.loss, has_aux=True)
    (loss, _), whole = jax.jit(gradient)(params, frozen, told, key)
    (mean, _), cut = jax.jit(accumulate_gradients(gradient, parts))(params, frozen, told, key)
    np.testing.assert_allclose(mean, loss, rtol=1e-5)
    for name, value in whole.items():
        size = float(jnp.max(jnp.abs(value)))
        np.testing.assert_allclose(cut[name], value, rtol=1e-4, atol=1e-5 * size, err_msg=name)
