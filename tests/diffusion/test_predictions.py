"""Every kind of prediction there and back, in float64, and the weights that tie their losses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import posterior_mean

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.denoising import (
    PREDICTION_TYPES,
    from_velocity,
    predict,
    target,
    to_score,
    to_velocity,
    velocity_coefficients,
)
from jaxdiff.diffusion.losses import WEIGHTINGS, add_noise, mse, regression, snr, weights
from jaxdiff.diffusion.schedules import EDMSchedule, FlowSchedule, VPSchedule

VP = (np.cos(np.linspace(0.1, 1.5, 5)), np.sin(np.linspace(0.1, 1.5, 5)))
FLOW = (1 - np.linspace(0.1, 0.9, 5), np.linspace(0.1, 0.9, 5))
PATHS = {"epsilon": (VP, FLOW), "sample": (VP, FLOW), "v_prediction": (VP,), "edm": (VP,)}
PATHS |= {"flow_prediction": (FLOW, VP), "score": (VP, FLOW)}
SCHEDULES = {
    "linear": (FlowSchedule(time_scale=1.0), np.linspace(0.05, 0.95, 7)),
    "linear to 1000": (FlowSchedule(), np.linspace(50.0, 950.0, 7)),
    "cosine": (FlowSchedule(time_scale=1.0, path="cosine"), np.linspace(0.05, 0.95, 7)),
    "vp": (VPSchedule(), np.linspace(50, 950, 7).astype(int)),
    "edm": (EDMSchedule(), np.log(np.geomspace(0.01, 60.0, 7)) / 4),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def draws(shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_round_trip(kind):
    x0, eps = draws((5, 4, 4, 3))
    for alpha, sigma in PATHS[kind]:
        alpha, sigma = jnp.asarray(alpha), jnp.asarray(sigma)
        x = add_noise(x0, eps, alpha, sigma)
        got = predict(kind, target(kind, x0, eps, alpha, sigma), x, alpha, sigma)
        np.testing.assert_allclose(got.x0, x0, atol=1e-12)
        np.testing.assert_allclose(got.eps, eps, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_prediction_splits_its_own_input(kind):
    output, x = draws((5, 2, 2, 1), seed=1)
    for alpha, sigma in PATHS[kind]:
        alpha, sigma = jnp.asarray(alpha), jnp.asarray(sigma)
        got = predict(kind, output, x, alpha, sigma)
        np.testing.assert_allclose(add_noise(got.x0, got.eps, alpha, sigma), x, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_golden_flow_numbers():
    alpha, sigma = jnp.array([0.6]), jnp.array([0.4])
    x0, eps = jnp.array([1.2]), jnp.array([-0.5])
    assert add_noise(x0, eps, alpha, sigma) == pytest.approx(0.52)
    assert target("flow_prediction", x0, eps, alpha, sigma) == pytest.approx(-1.7)


@pytest.mark.usefixtures("x64")
def test_golden_score_and_velocity():
    """Both conventions: v = eps - x0 with time to noise, u = x0 - eps with time tau to data."""
    x0, eps, alpha, sigma = (jnp.array([value]) for value in (1.2, -0.5, 0.6, 0.4))
    x = add_noise(x0, eps, alpha, sigma)
    prediction = predict("flow_prediction", jnp.array([-1.7]), x, alpha, sigma)
    assert to_score(prediction, sigma) == pytest.approx(1.25, abs=1e-12)
    assert to_velocity(prediction, -jnp.ones(1), jnp.ones(1)) == pytest.approx(-1.7, abs=1e-12)
    assert to_velocity(prediction, jnp.ones(1), -jnp.ones(1)) == pytest.approx(1.7, abs=1e-12)
    tau, u = 0.6, 1.7
    assert (tau * u - float(x[0])) / (1 - tau) == pytest.approx(1.25, abs=1e-12)


@pytest.mark.usefixtures("x64")
def test_golden_score_of_a_mixture():
    """Data N(-2, 1/4) and N(2, 1/4) with weights 1/2, and the second alone, at x = 0.3, sigma 1."""
    x, one = jnp.array([0.3]), jnp.ones(1)
    scores = []
    for mix, score in (([0.5, 0.5], 0.4739897764), ([0.0, 1.0], 1.36)):
        D = posterior_mean(x, one, one, (-2.0, 2.0), (0.25, 0.25), jnp.array([mix]))
        got = to_score(predict("sample", D, x, one, one), one)
        assert got == pytest.approx(score, abs=1e-9)
        assert predict("score", got, x, one, one).x0 == pytest.approx(float(D[0]), abs=1e-12)
        scores.append(got)
    guided = scores[0] + 3 * (scores[1] - scores[0])
    assert guided == pytest.approx(3.1320204472, abs=1e-9)
    assert predict("score", guided, x, one, one).x0 == pytest.approx(3.4320204472, abs=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", SCHEDULES)
def test_velocity_and_score_there_and_back_on_every_path(path):
    schedule, t = SCHEDULES[path]
    levels = (*schedule.alpha_sigma(t), *schedule.derivatives(t))
    alpha, sigma, d_alpha, d_sigma = map(jnp.asarray, levels)
    x0, eps = draws((7, 3, 3, 2))
    x = add_noise(x0, eps, alpha, sigma)
    velocity = to_velocity(predict("sample", x0, x, alpha, sigma), d_alpha, d_sigma)
    got = from_velocity(velocity, x, alpha, sigma, d_alpha, d_sigma)
    np.testing.assert_allclose(got.x0, x0, atol=1e-12)
    np.testing.assert_allclose(got.eps, eps, atol=1e-12)
    score = to_score(got, sigma)
    back = predict("score", score, x, alpha, sigma)
    np.testing.assert_allclose(back.x0, x0, atol=1e-12)
    np.testing.assert_allclose(back.eps, eps, atol=1e-12)
    a, b = (c[:, None, None, None] for c in velocity_coefficients(alpha, sigma, d_alpha, d_sigma))
    scale = float(jnp.max(jnp.abs(velocity)))
    np.testing.assert_allclose(a * x + b * score, velocity, atol=1e-12 * max(scale, 1))


@pytest.mark.usefixtures("x64")
def test_coefficients_of_the_linear_path_with_time_to_the_data():
    """A = 1 / tau and B = (1 - tau) / tau, with alpha' = 1 and sigma' = -1 by tau."""
    tau = np.linspace(0.1, 0.9, 9)
    a, b = velocity_coefficients(tau, 1 - tau, np.ones(9), -np.ones(9))
    np.testing.assert_allclose(a, 1 / tau, rtol=1e-14)
    np.testing.assert_allclose(b, (1 - tau) / tau, rtol=1e-14)


@pytest.mark.usefixtures("x64")
def test_flow_and_cosine_networks_output_velocities():
    x0, eps = draws((5, 2, 2, 1))
    s = np.linspace(0.1, 0.9, 5)
    for path, kind, factor in (
        ("linear", "flow_prediction", 1),
        ("cosine", "v_prediction", np.pi / 2),
    ):
        schedule = FlowSchedule(time_scale=1.0, path=path)
        alpha, sigma, *rates = map(
            jnp.asarray, (*schedule.alpha_sigma(s), *schedule.derivatives(s))
        )
        prediction = predict("sample", x0, add_noise(x0, eps, alpha, sigma), alpha, sigma)
        output = target(kind, x0, eps, alpha, sigma)
        np.testing.assert_allclose(to_velocity(prediction, *rates), factor * output, atol=1e-12)


def test_scalars_and_per_image_levels_agree():
    output, x = (a.astype(jnp.float32) for a in draws((3, 4, 4, 2)))
    for kind in PREDICTION_TYPES:
        one = predict(kind, output, x, jnp.float32(0.6), jnp.float32(0.8))
        many = predict(kind, output, x, jnp.full(3, 0.6), jnp.full(3, 0.8))
        np.testing.assert_array_equal(one.x0, many.x0)
        np.testing.assert_array_equal(one.eps, many.eps)


def test_v_prediction_is_finite_at_zero_snr():
    x, v = (a.astype(jnp.float32) for a in draws((2, 4)))
    got = predict("v_prediction", v, x, jnp.float32(0), jnp.float32(1))
    np.testing.assert_array_equal(got.x0, -v)
    np.testing.assert_array_equal(got.eps, x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_min_snr_is_one_loss_whatever_is_predicted(kind):
    x0, eps = draws((5, 4, 4, 3))
    wrong, _ = draws((5, 4, 4, 3), seed=2)
    for alpha, sigma in PATHS[kind][:1]:
        alpha, sigma = jnp.asarray(alpha), jnp.asarray(sigma)
        S = snr(alpha, sigma)
        x = add_noise(x0, eps, alpha, sigma)
        eps_of_wrong = predict("sample", wrong, x, alpha, sigma).eps
        output = target(kind, wrong, eps_of_wrong, alpha, sigma)
        pair = regression(kind, output, x0, eps, alpha, sigma)
        loss = mse(*pair, weights("min_snr", kind, S))
        of_x0 = mse(wrong, x0, jnp.minimum(S, 5.0))
        assert loss == pytest.approx(float(of_x0), rel=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_smooth_weights_are_one_loss_whatever_is_predicted(kind):
    x0, eps = draws((5, 4, 4, 3))
    wrong, _ = draws((5, 4, 4, 3), seed=2)
    alpha, sigma = (jnp.asarray(level) for level in PATHS[kind][0])
    S, gamma = snr(alpha, sigma), 0.7
    x = add_noise(x0, eps, alpha, sigma)
    eps_of_wrong = predict("sample", wrong, x, alpha, sigma).eps
    output = target(kind, wrong, eps_of_wrong, alpha, sigma)
    output, right = regression(kind, output, x0, eps, alpha, sigma)
    loss = mse(output, right, weights("soft_min_snr", kind, S, gamma))
    assert loss == pytest.approx(float(mse(wrong, x0, S * gamma / (S + gamma))), rel=1e-12)
    loss = mse(output, right, weights("p2", kind, S, gamma))
    assert loss == pytest.approx(float(mse(eps_of_wrong, eps, (1 + S) ** -gamma)), rel=1e-12)


def test_smooth_weights_by_hand():
    S = jnp.array([0.0, 1.0, 5.0, 20.0])
    soft = {
        "epsilon": [1, 5 / 6, 1 / 2, 1 / 5],
        "sample": [0, 5 / 6, 5 / 2, 4],
        "v_prediction": [0, 5 / 12, 5 / 12, 4 / 21],
        "edm": [0, 5 / 12, 5 / 12, 4 / 21],
    }
    for kind, expected in soft.items():
        np.testing.assert_allclose(weights("soft_min_snr", kind, S), expected, rtol=1e-6)
    p2 = {"epsilon": [1, 1 / 2, 1 / 6, 1 / 21], "sample": [0, 1 / 2, 5 / 6, 20 / 21]}
    for kind, expected in p2.items():
        np.testing.assert_allclose(weights("p2", kind, S, 1.0), expected, rtol=1e-6)


def test_min_snr_values():
    S = jnp.array([0.0, 1.0, 5.0, 20.0])
    by_hand = {
        "epsilon": [1, 1, 1, 0.25],
        "sample": [0, 1, 5, 5],
        "v_prediction": [0, 1 / 2, 5 / 6, 5 / 21],
        "edm": [0, 1 / 2, 5 / 6, 5 / 21],
        "flow_prediction": [0, 1 / 4, 5 / (1 + 5**0.5) ** 2, 5 / (1 + 20**0.5) ** 2],
    }
    for kind, expected in by_hand.items():
        np.testing.assert_allclose(weights("min_snr", kind, S), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("weighting", "kind"), list(itertools.product(WEIGHTINGS, PREDICTION_TYPES))
)
def test_every_weighting_is_finite_and_never_negative(weighting, kind):
    S = jnp.array([0.0, 1e-6, 1.0, 1e6])
    w = weights(weighting, kind, S)
    assert w.shape == (4,)
    assert w.dtype == jnp.float32
    assert np.all(np.isfinite(w))
    assert np.all(w >= 0)


def test_a_perfect_network_has_no_loss():
    x0, eps = (a.astype(jnp.float32) for a in draws((3, 4, 4, 1)))
    alpha, sigma = jnp.full(3, 0.6), jnp.full(3, 0.8)
    for kind in PREDICTION_TYPES:
        pair = regression(kind, target(kind, x0, eps, alpha, sigma), x0, eps, alpha, sigma)
        loss = mse(*pair, weights("uniform", kind, snr(alpha, sigma)))
        assert loss == pytest.approx(0, abs=1e-12)


def test_the_error_of_a_score_counts_as_that_of_the_noise_at_clean_levels_too():
    x0, eps = (a.astype(jnp.float32) for a in draws((2, 3)))
    alpha, sigma = jnp.array([1.0, 0.6]), jnp.array([0.0, 0.8])
    output, wanted = regression("score", jnp.zeros((2, 3)), x0, eps, alpha, sigma)
    np.testing.assert_array_equal(output, 0)
    np.testing.assert_array_equal(wanted, -eps)


def test_mse_is_the_mean_over_elements_then_images():
    output = jnp.array([[1.0, 1.0], [2.0, 0.0]])
    assert mse(output, jnp.zeros((2, 2)), jnp.array([1.0, 3.0])) == pytest.approx((1 + 6) / 2)


def test_unknown_names_are_refused():
    x = jnp.zeros((1, 2))
    with pytest.raises(InputError, match="prediction_type: got 'eps'"):
        predict("eps", x, x, jnp.float32(1), jnp.float32(0))
    with pytest.raises(InputError, match="did you mean 'min_snr'"):
        weights("min-snr", "epsilon", jnp.ones(1))
