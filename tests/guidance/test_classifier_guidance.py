"""Steering by a classifier and by a loss, on the exact scores of Gaussian mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian, level_at, mixture, ratio_grid

from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.diffusion.grids import karras
from jaxdiff.guidance.base import RULES, GuidanceScales
from jaxdiff.guidance.classifier_guidance import (
    classifier_guidance,
    log_prob_gradient,
    loss_guidance,
    shift_x0,
    spherical,
)
from jaxdiff.guidance.denoiser import guided_denoiser, stack_streams
from jaxdiff.samplers.base import SAMPLERS, init_state
from jaxdiff.samplers.ddpm import DDPM
from jaxdiff.samplers.sampling import sample

pytestmark = pytest.mark.usefixtures("x64")
MEANS, VARIANCE = (-2.0, 2.0), 0.25


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def classifier(x, level):
    """The exact log p(class +2 | x) for N(-2, .25) / 2 + N(2, .25) / 2, summed over an image."""
    spread = level.alpha**2 * VARIANCE + level.sigma**2
    log_p = jnp.stack([-((x - level.alpha * m) ** 2) / (2 * spread) for m in MEANS], -1)
    return jax.nn.log_softmax(log_p, -1)[..., 1].reshape(len(x), -1).sum(1)


def denoiser(null=True, w=None):
    """The mixture's denoiser: unconditional, of class +2, or guided by w."""
    both = jnp.array([[0.5, 0.5]]), jnp.array([[0.0, 1.0]])
    chosen = both if w is not None else both[:1] if null else both[1:]
    rule = RULES["none" if w is None else "cfg"]
    dials = GuidanceScales(jnp.array([1.0 if w is None else w]))
    network = mixture("epsilon", MEANS, (VARIANCE, VARIANCE))
    return guided_denoiser(
        network, (), stack_streams(*chosen), dials, rule=rule, prediction_type="epsilon"
    )


def test_golden_gradient_of_the_exact_classifier():
    here = level_at(jnp.float64(1.0))
    gradient = log_prob_gradient(classifier, jnp.array([[0.3]]) * here.alpha, here)
    # of log r by x / alpha
    assert (gradient * here.alpha).item() == pytest.approx(0.8860102236, abs=1e-9)


@pytest.mark.parametrize("k", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("ratio", [0.2, 1.0, 7.0])
def test_an_exact_classifier_is_classifier_free_guidance(k, ratio):
    """On the unconditional model it is w = k, on the conditional one w = 1 + k."""
    here, x = level_at(jnp.float64(ratio)), jnp.array([[0.3, -0.4, 1.7]])
    for null, w in ((True, k), (False, 1 + k)):
        steered = classifier_guidance(denoiser(null), classifier, jnp.array([k]))
        got, _ = steered(x, here, ())
        expected, _ = denoiser(w=w)(x, here, ())
        np.testing.assert_allclose(got.x0, expected.x0, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got.eps, expected.eps, rtol=1e-9, atol=1e-9)


def test_from_pure_noise_nothing_moves():
    alpha, sigma = jnp.zeros((1, 1)), jnp.ones((1, 1))
    noise = level_at(jnp.float64(1.0))._replace(alpha=alpha, sigma=sigma)
    prediction = Prediction(jnp.ones((1, 3)), jnp.zeros((1, 3)))
    got = shift_x0(prediction, noise, jnp.array([5.0]), jnp.ones((1, 3)))
    np.testing.assert_array_equal(got.x0, prediction.x0)


def test_the_ancestral_form_moves_the_mean_by_variance_times_score():
    here, there = (level_at(jnp.float64(ratio)) for ratio in (2.0, 1.2))
    x, k = jnp.array([[0.3, -0.4]]), 1.7
    sampler = DDPM().with_score(lambda x, level: k * log_prob_gradient(classifier, x, level))

    def stepped(sampler, z):
        carry = init_state(x, sampler=sampler)
        return sampler.step(denoiser(), carry, here, there, lambda: jnp.full((1, 2), z)).x

    plain, steered = stepped(DDPM(), 0.0), stepped(sampler, 0.0)
    deviation = stepped(DDPM(), 1.0) - plain
    expected = deviation**2 * k * log_prob_gradient(classifier, x, here)
    np.testing.assert_allclose(steered - plain, expected, rtol=1e-9)


def test_ancestral_steering_ends_where_guided_gaussians_do():
    """p(x|c) = N(1, v) and p(x) = N(.4, v): score k (m_c - m_u) alpha / (alpha^2 v + sigma^2)."""
    mu, mc, v, k = 0.4, 1.0, 0.3, 2.0

    def score(x, level):
        spread = level.alpha**2 * v + level.sigma**2
        return jnp.broadcast_to(k * level.alpha * (mc - mu) / spread, x.shape)

    sampler = DDPM().with_score(score)
    conditioning = stack_streams((jnp.full(1, mu), jnp.full(1, v)))
    dials = GuidanceScales(jnp.ones(1))
    denoise = guided_denoiser(
        gaussian("epsilon"), (), conditioning, dials, rule=RULES["none"], prediction_type="epsilon"
    )

    def end(steps):
        grid = ratio_grid(np.append(karras(500.0, 0.01, steps), 0), jnp.float64)

        def step(i, carry):
            levels = (grid.level(jnp.full(1, j), 1) for j in (i, i + 1))
            return sampler.step(denoise, carry, *levels, lambda: jnp.zeros(1))

        return jax.lax.fori_loop(0, steps, step, init_state(jnp.zeros(1), sampler=sampler)).x

    # Of first order: extrapolated to infinitely many steps.
    np.testing.assert_allclose(2 * end(1000) - end(500), mu + k * (mc - mu), rtol=1e-3)


def test_a_loss_of_the_image_falls_and_its_gradient_goes_through_the_denoiser():
    here, x = level_at(jnp.float64(1.5)), jnp.array([[0.3, -0.4, 1.7]])
    wanted = jnp.array([[1.0, 1.0, -1.0]])

    def loss(D):
        return jnp.sum((D - wanted) ** 2, axis=1)

    def total(x):
        return float(loss(denoiser()(x, here, ())[0].x0)[0])

    base, _ = denoiser()(x, here, ())
    got, _ = loss_guidance(denoiser(), loss, jnp.array([0.1]))(x, here, ())
    h = 1e-5
    steps = jnp.eye(3)[:, None] * h
    gradient = jnp.array([(total(x + s) - total(x - s)) / (2 * h) for s in steps])
    np.testing.assert_allclose(got.eps - base.eps, 0.1 * here.sigma * gradient[None], rtol=1e-6)
    assert float(loss(got.x0)[0]) < float(loss(base.x0)[0])


def test_steering_by_nothing_changes_nothing():
    here, x = level_at(jnp.float64(1.5)), jnp.array([[0.3, -0.4]])
    base, _ = denoiser(w=3.0)(x, here, ())
    for steered in (
        classifier_guidance(denoiser(w=3.0), classifier, jnp.zeros(1)),
        loss_guidance(denoiser(w=3.0), lambda D: jnp.sum(D**2, 1), jnp.zeros(1)),
    ):
        got, _ = steered(x, here, ())
        np.testing.assert_array_equal(got.x0, base.x0)
        np.testing.assert_array_equal(got.eps, base.eps)


def test_steered_denoisers_sample():
    """By the ODE, an exact classifier with k = 1 on the unconditional model draws its class."""
    grid = ratio_grid(np.append(karras(80.0, 0.01, 60), 0), jnp.float64)
    keys = jax.vmap(jax.random.key)(jnp.arange(1, dtype=jnp.uint32))
    steered = classifier_guidance(denoiser(), classifier, jnp.ones(1))
    x = jnp.linspace(-2.5, 2.5, 41)[None]
    got = sample(steered, x, grid, keys, sampler=SAMPLERS["dpmpp-2m"])
    expected = sample(denoiser(null=False), x, grid, keys, sampler=SAMPLERS["dpmpp-2m"])
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert np.all(np.asarray(got) > 0)


def test_the_spherical_distance_is_half_the_squared_angle():
    angles = np.array([0.0, 1e-4, 0.3, np.pi / 2, 3.0])
    a = jnp.tile(jnp.array([[1.0, 0.0]]), (5, 1))
    b = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    np.testing.assert_allclose(spherical(a, b), angles**2 / 2, rtol=1e-6, atol=1e-12)
    gradient = jax.grad(lambda b: jnp.sum(spherical(a, b)))(b)
    assert np.all(np.isfinite(gradient))
    opposite = jax.grad(lambda b: jnp.sum(spherical(a, b)))(-a)
    assert np.all(np.isfinite(opposite))
