"""The denoising loss: zero for perfect networks, dropped captions, draws for each sample."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import OBJECTIVE, TEXT, VAE

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.predictions import KINDS, target
from jaxdiff.models.build import abstract, initialise, weights
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.training.objectives.diffusion import (
    Frozen,
    denoising_loss,
    diffusion_learner,
    draw_times,
    drop_captions,
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def frozen():
    return Frozen(
        vae=weights(initialise(AutoencoderKL, VAE, seed=0)),
        text_encoder=weights(initialise(CLIPTextModel, TEXT, seed=1)),
        null=jnp.asarray([18, 19, 19, 19, 19]),
    )


def learner(**changes):
    return diffusion_learner(
        dataclasses.replace(OBJECTIVE, **changes),
        abstract(AutoencoderKL, VAE),
        abstract(CLIPTextModel, TEXT),
    )


def scattered(learn):
    """Initial weights with noise: layers that begin at zero would hide the others."""
    return {path: jnp.asarray(array) + 0.1 * normal(*array.shape) for path, array in learn.init(2)}


def batch(b=3):
    ids = np.full((b, 5), 19)
    ids[:, 0], ids[:, 1] = 18, np.arange(b)
    return {"image": jnp.tanh(normal(b, 8, 8, 3)), "ids": jnp.asarray(ids)}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_a_perfect_network_loses_nothing(kind, weighting):
    config = dataclasses.replace(OBJECTIVE, prediction_type=kind, weighting=weighting)
    x0, eps, t = normal(4, 4, 4, 2), normal(4, 4, 4, 2), jnp.asarray([0, 5, 500, 999])
    alpha, sigma = config.schedule.gather(t)
    seen = []

    def perfect(x, times):
        seen.append((x, times))
        return target(kind, x0, eps, alpha, sigma)

    assert float(denoising_loss(config, perfect, x0, t, eps)) == 0
    (x, times), a, s = seen[0], alpha[:, None, None, None], sigma[:, None, None, None]
    np.testing.assert_allclose(x, a * x0 + s * eps, rtol=1e-6)
    np.testing.assert_array_equal(times, t)


def test_captions_are_dropped_one_by_one_at_the_given_rate():
    n, rate = 4000, 0.1
    ids = jnp.ones((n, 5), jnp.int32)
    null = jnp.zeros(5, jnp.int32)
    after, dropped = drop_captions(jax.random.key(3), ids, null, rate)
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
    t = np.asarray(draw_times(jax.random.key(0), (20_000,), 100, how, shift))
    assert t.min() >= 0
    assert t.max() <= 99
    assert len(np.unique(t)) > 95
    assert abs(np.mean(t < 100 * quartile) - 0.25) < 0.02


def test_frozen_weights_get_no_gradient_and_all_others_do(frozen):
    learn = learner()
    params = scattered(learn)
    told = batch()

    def loss(ours, vae, text_encoder):
        theirs = Frozen(vae, text_encoder, frozen.null)
        return learn.loss(ours, theirs, told, jax.random.key(0))[0]

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    ours, *theirs = gradients(params, frozen.vae, frozen.text_encoder)
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
    learn = learner(prediction_type="epsilon")
    params = {path: jnp.asarray(array) for path, array in learn.init(2)}
    many = batch(256)
    value, _ = jax.jit(learn.loss)(params, frozen, many, jax.random.key(0))
    # the output is 0 at first, so the loss is the mean square of 256 * 4 * 4 * 2 normal draws
    assert abs(float(value) - 1) < 4 * np.sqrt(2 / (256 * 32))


def test_computing_in_bfloat16_needs_no_implicit_promotion(frozen):
    half = jnp.bfloat16
    learn = diffusion_learner(
        OBJECTIVE,
        abstract(AutoencoderKL, VAE, dtype=half),
        abstract(CLIPTextModel, TEXT, dtype=half),
        half,
    )
    value, _ = jax.eval_shape(learn.loss, learn.shapes, frozen, batch(), jax.random.key(0))
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in learn.shapes.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction_type", "v"),
        ("weighting", "snr"),
        ("times", "normal"),
        ("caption_dropout", 1.5),
        ("gamma", 0.0),
        ("sample_steps", 0),
    ],
)
def test_impossible_choices_are_refused(field, value):
    with pytest.raises(InputError, match=rf"objective\.{field}: got"):
        dataclasses.replace(OBJECTIVE, **{field: value})
