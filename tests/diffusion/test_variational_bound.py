"""The variational bound in float64: closed forms of Gaussian data, and the formulas in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from tiny_training import OBJECTIVE

from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.diffusion.variational_bound import bound_terms, discretised_log_likelihood
from jaxdiff.training.objectives.diffusion import denoising_losses

SCHEDULES = {
    "linear": VPSchedule(),
    "cosine": VPSchedule(beta_schedule="cosine"),
    "no signal at the end": VPSchedule(beta_schedule="scaled_linear", zero_terminal_snr=True),
    "few levels": VPSchedule(num_train_timesteps=20, beta_start=0.01, beta_end=0.4),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def posterior(schedule, t, x0, x):
    """Mean and variance of q(x' | x, x0), from betas (2006.11239, eq. 6 and 7), and beta."""
    abar = schedule.alphas_cumprod
    before = abar[t - 1] if t else 1.0
    beta = 1 - abar[t] / before
    mean = np.sqrt(before) * beta / (1 - abar[t]) * x0
    mean = mean + np.sqrt(1 - beta) * (1 - before) / (1 - abar[t]) * x
    return mean, (1 - before) / (1 - abar[t]) * beta, beta


def term(schedule, t, variance, D, x0, x):
    """A term of L_vlb in bits, as the code of Improved DDPM has it: KL of two normals, or bins."""
    mean, var, beta = posterior(schedule, t, x0, x)
    smallest = var if t else posterior(schedule, 1, x0, x)[1]
    f = (variance + 1) / 2
    log_var = f * np.log(beta) + (1 - f) * np.log(smallest)
    own = posterior(schedule, t, D, x)[0]
    if t:
        kl = -1 + log_var - np.log(var) + (var + (mean - own) ** 2) / np.exp(log_var)
        return np.mean(0.5 * kl) / np.log(2)
    std = np.exp(0.5 * log_var)
    above = np.where(x0 > 0.999, 1, norm.cdf(x0 + 1 / 255, own, std))
    below = np.where(x0 < -0.999, 0, norm.cdf(x0 - 1 / 255, own, std))
    return -np.mean(np.log(above - below)) / np.log(2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_losses_are_those_of_the_formulas(schedule, kind):
    if schedule.zero_terminal_snr and kind == "epsilon":
        return  # which no schedule without signal at its end is trained with
    T, rng = schedule.num_discrete, np.random.default_rng(0)
    t = np.array([0, 0, 1, 2, T // 2, T - 1])
    x0, eps, wrong = (rng.normal(size=(len(t), 3, 4, 2)) for _ in range(3))
    x0[:2] = np.clip(0.6 * x0[:2], -1, 1)  # both bins without an end, and others
    variance = rng.uniform(-1.2, 1.2, x0.shape)
    a, s = (each[:, None, None, None] for each in schedule.alpha_sigma(t))
    x = a * x0 + s * eps
    exact = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[kind]
    wrong = 0.1 * (s if kind == "sample" else 1) * wrong
    predicted = exact + wrong
    off = {"epsilon": -s / a if np.all(a) else 0, "v_prediction": -s, "sample": 1.0}[kind]
    D = x0 + off * wrong
    got = bound_terms(schedule, *(jnp.asarray(array) for array in (variance, D, x0, t)))
    for i, level in enumerate(t):
        expected = term(schedule, level, variance[i], D[i], x0[i], x[i])
        np.testing.assert_allclose(got[i], expected, rtol=1e-7, atol=1e-10)
    # As in a training, in float32.
    config = dataclasses.replace(OBJECTIVE, schedule=schedule, prediction_type=kind, sample_steps=9)
    output = jnp.asarray(np.concatenate([predicted, variance], axis=-1), jnp.float32)

    def network(noisy, times):
        np.testing.assert_allclose(noisy, x, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(times, t)
        return output

    error, bound = denoising_losses(
        config,
        network,
        jnp.asarray(x0, jnp.float32),
        jnp.asarray(t),
        jnp.asarray(eps, jnp.float32),
    )
    np.testing.assert_allclose(error, np.mean(wrong**2, (1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(bound, T * got, rtol=1e-4, atol=1e-6)


def test_only_the_variance_has_a_gradient_of_the_bound(schedule):
    """The prediction has that of the squared error, whatever the variance."""
    kind = "v_prediction"
    config = dataclasses.replace(OBJECTIVE, schedule=schedule, prediction_type=kind, sample_steps=9)
    key, t = jax.random.key(0), jnp.array([0, 1, schedule.num_discrete - 1])
    x0, eps, output, variance = jax.random.normal(key, (4, 3, 2, 2, 2), jnp.float32)
    alone = jax.grad(lambda y: denoising_losses(config, lambda *_: y, x0, t, eps).error.sum())

    def hybrid(output, variance):
        both = jnp.concatenate([output, variance], axis=-1)
        error, bound = denoising_losses(config, lambda *_: both, x0, t, eps)
        return jnp.sum(error + 0.7 * bound)

    own, other = jax.grad(hybrid, (0, 1))(output, variance)
    np.testing.assert_array_equal(own, alone(output))
    assert jnp.all(jnp.any(other != 0, axis=(1, 2, 3)))
    assert jnp.all(jnp.isfinite(other))


def reverse_variance(schedule, t, spread):
    """Var(x' | x) of data N(0, spread^2): beta~ and that of x0, which x leaves unknown."""
    a, s = schedule.alpha[t], schedule.sigma[t]
    unknown = (spread * s) ** 2 / ((spread * a) ** 2 + s**2)
    ones, zeros = np.ones(1), np.zeros(1)
    _, var, beta = posterior(schedule, t, zeros, zeros)
    weight = posterior(schedule, t, ones, zeros)[0][0]
    smallest = var if t else posterior(schedule, 1, zeros, zeros)[1]
    output = 2 * np.log((var + weight**2 * unknown) / smallest) / np.log(beta / smallest) - 1
    return output, np.sqrt(unknown)


@pytest.mark.parametrize("spread", [0.1, 0.7, 1.0])
def test_the_optimum_of_gaussian_data(spread):
    """The mean error of an exact D is the unknown deviation of x0, here the error itself.

    Of data with the variance of noise the optimum is beta, and near it for others.
    """
    schedule = SCHEDULES["few levels"]
    T = schedule.num_discrete
    optimum, error = np.array([reverse_variance(schedule, t, spread) for t in range(1, T)]).T
    if spread == 1:
        np.testing.assert_allclose(optimum, 1, rtol=1e-9)

    def total(variance):
        x0, t = jnp.zeros((T - 1, 1)), jnp.arange(1, T)
        return jnp.sum(bound_terms(schedule, variance, jnp.asarray(error)[:, None], x0, t))

    at = jnp.asarray(optimum)[:, None]
    np.testing.assert_allclose(jax.grad(total)(at), 0, atol=1e-12)
    assert all(total(at + step) > total(at) for step in (-0.1, 0.1))


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_the_bound_of_an_exact_model_is_the_entropy(spread):
    """Steps of Gaussian data are normal, so L_vlb with the prior's term is what the data have."""
    schedule = VPSchedule(num_train_timesteps=200, beta_start=0.01, beta_end=0.1)
    T = schedule.num_discrete
    variance, error = (
        jnp.asarray(column)[:, None]
        for column in np.array([reverse_variance(schedule, t, spread) for t in range(T)]).T
    )
    t = jnp.arange(1, T)
    bound = jnp.sum(bound_terms(schedule, variance[1:], error[1:], jnp.zeros((T - 1, 1)), t))
    # At t = 0 the mean of bins' information over the error of D, by Gauss-Hermite quadrature.
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    D = jnp.asarray(nodes)[:, None] * error[:1]
    x0 = jnp.zeros_like(D)
    decoder = bound_terms(
        schedule, jnp.broadcast_to(variance[:1], D.shape), D, x0, jnp.zeros(60, jnp.int32)
    )
    bound += np.sum(weights * np.asarray(decoder)) / np.sum(weights)
    a2, s2 = schedule.alpha[-1] ** 2, schedule.sigma[-1] ** 2
    prior = 0.5 * (s2 + a2 * spread**2 - 1 - np.log(s2)) / np.log(2)
    entropy = 0.5 * np.log2(2 * np.pi * np.e * spread**2) - np.log2(2 / 255)
    np.testing.assert_allclose(bound + prior, entropy, atol=1e-3)


def test_bins_are_probabilities():
    """The 256 of an 8-bit image add up to 1, also where nearly all is beyond the last one."""
    values = jnp.asarray(np.linspace(-1, 1, 256))
    for mean, std in ((0.1, 0.3), (0.0, 3.0), (2.5, 0.4), (0.5, 0.001)):
        found = discretised_log_likelihood(values, jnp.full(256, mean), jnp.full(256, np.log(std)))
        assert float(jnp.sum(jnp.exp(found))) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("distance", [0.0, 10.0, 1e4])
def test_gradients_are_finite_in_float32(distance):
    schedule = SCHEDULES["linear"]
    x0 = jnp.array([[0.3], [-1.0], [1.0]], jnp.float32)
    for level in (0, 1, 999):

        def total(variance, D, level=level):
            return jnp.sum(bound_terms(schedule, variance, D, x0, jnp.full(3, level)))

        gradients = jax.grad(total, (0, 1))(jnp.zeros_like(x0), x0 + distance)
        assert all(jnp.isfinite(each).all() for each in gradients)
