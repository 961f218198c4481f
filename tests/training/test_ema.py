"""The moving average: its warm-up, its fixed point, its precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.training import power_ema
from jaxdiff.training.step import ema_decay, update_ema


def test_warm_up():
    decays = [float(ema_decay(jnp.int32(n), 0.99)) for n in (0, 8, 90, 10**6)]
    np.testing.assert_allclose(decays, [0.1, 0.5, 0.91, 0.99], rtol=1e-6)


def test_without_warm_up_the_decay_is_constant():
    decays = [float(ema_decay(jnp.int32(n), 0.99, warmup=False)) for n in (0, 8, 10**6)]
    np.testing.assert_allclose(decays, 0.99, rtol=1e-6)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(width, gamma):
    """The two pairs that EDM2 (2312.02696, section 3.2) names."""
    assert abs(power_ema.std_to_exponent(width) - gamma) < 0.005


@functools.partial(jax.jit, static_argnames="width")
def averages(width, values):
    """The average after each of the values, as the step makes it."""

    def step(state, numbered):
        n, value = numbered
        state = update_ema(state, {"a": value}, power_ema.power_decay(n, width))
        return state, state["a"]

    numbered = jnp.arange(len(values), dtype=jnp.int32), jnp.asarray(values, jnp.float32)
    return jax.lax.scan(step, {"a": jnp.float32(99.0)}, numbered)[1]


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_a_power_average_weighs_by_a_power_of_time(width):
    """Of the values 1 ... n the mean and deviation of t^gamma's profile come out, n being large."""
    n, gamma = 400, power_ema.std_to_exponent(width)
    times = np.arange(1, n + 1) / n
    (first, second) = (averages(width, values)[-1] for values in (times, times**2))
    assert abs(first - (gamma + 1) / (gamma + 2)) < 2e-3
    assert abs(np.sqrt(second - first**2) - width) < 2e-3


@pytest.mark.parametrize("width", [0.05, 0.07, 0.1, 0.15])
def test_any_width_is_made_of_snapshots_of_two(width):
    """Weights on a random walk: what is combined is near the average itself."""
    walk = np.cumsum(np.random.default_rng(0).normal(size=480)) / 10
    after = {w: np.asarray(averages(w, walk)) for w in (0.05, 0.1)}
    kept = {(t, w): after[w][t - 1] for w in after for t in range(40, 481, 40)}
    parts = power_ema.post_hoc_coefficients(list(kept), 480, width)
    found = sum(p * value for p, value in zip(parts, kept.values(), strict=True))
    assert abs(found - averages(width, walk)[-1]) < 0.02 * np.std(walk)
    # The exponential average at hand would be far off.
    assert abs(kept[480, 0.05] - kept[480, 0.1]) > 0.02 * np.std(walk)


def test_a_width_that_is_kept_is_taken_as_it_is():
    parts = power_ema.post_hoc_coefficients([(40, 0.05), (40, 0.1), (80, 0.05), (80, 0.1)], 80, 0.1)
    np.testing.assert_allclose(parts, [0, 0, 0, 1], atol=1e-9)


def test_equal_trees_are_an_exact_fixed_point():
    params = {"a": jnp.asarray(np.random.default_rng(0).normal(size=100), jnp.float32)}
    for n in (0, 7, 1000):
        after = update_ema(params, params, ema_decay(jnp.int32(n), 0.9999))
        np.testing.assert_array_equal(after["a"], params["a"])


def test_is_the_weighted_mean():
    after = update_ema({"a": jnp.float32(1)}, {"a": jnp.float32(3)}, jnp.float32(0.75))
    assert float(after["a"]) == 1.5


def test_stays_float32_for_parameters_of_less_precision():
    before = {"a": jnp.ones(3)}
    after = update_ema(before, {"a": jnp.ones(3, jnp.bfloat16) * 2}, jnp.float32(0.9999))
    assert after["a"].dtype == jnp.float32
    # 1 + 1e-4 is not a bfloat16
    np.testing.assert_allclose(after["a"], 1.0001, rtol=1e-6)
