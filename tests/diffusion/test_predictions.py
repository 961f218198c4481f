"""Every kind of prediction there and back, in float64, and the weights that tie their losses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.denoising import PREDICTION_TYPES, predict, target
from jaxdiff.diffusion.losses import WEIGHTINGS, add_noise, mse, snr, weights

VP = (np.cos(np.linspace(0.1, 1.5, 5)), np.sin(np.linspace(0.1, 1.5, 5)))
FLOW = (1 - np.linspace(0.1, 0.9, 5), np.linspace(0.1, 0.9, 5))
PATHS = {"epsilon": (VP, FLOW), "sample": (VP, FLOW), "v_prediction": (VP,), "edm": (VP,)}
PATHS["flow_prediction"] = (FLOW, VP)


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
        loss = mse(output, target(kind, x0, eps, alpha, sigma), weights("min_snr", kind, S))
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
    output, right = (
        target(kind, wrong, eps_of_wrong, alpha, sigma),
        target(kind, x0, eps, alpha, sigma),
    )
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
        y = target(kind, x0, eps, alpha, sigma)
        assert mse(y, y, weights("uniform", kind, snr(alpha, sigma))) == 0


def test_mse_is_the_mean_over_elements_then_images():
    output = jnp.array([[1.0, 1.0], [2.0, 0.0]])
    assert mse(output, jnp.zeros((2, 2)), jnp.array([1.0, 3.0])) == pytest.approx((1 + 6) / 2)


def test_unknown_names_are_refused():
    x = jnp.zeros((1, 2))
    with pytest.raises(InputError, match="prediction_type: got 'eps'"):
        predict("eps", x, x, jnp.float32(1), jnp.float32(0))
    with pytest.raises(InputError, match="did you mean 'min_snr'"):
        weights("min-snr", "epsilon", jnp.ones(1))
