"""The moving average: its warm-up, its fixed point, its precision."""

import jax.numpy as jnp
import numpy as np

from jaxdiff.training import ema


def test_warm_up():
    decays = [float(ema.decay_at(jnp.int32(n), 0.99)) for n in (0, 8, 90, 10**6)]
    np.testing.assert_allclose(decays, [0.1, 0.5, 0.91, 0.99], rtol=1e-6)


def test_equal_trees_are_an_exact_fixed_point():
    params = {"a": jnp.asarray(np.random.default_rng(0).normal(size=100), jnp.float32)}
    for n in (0, 7, 1000):
        after = ema.update(params, params, ema.decay_at(jnp.int32(n), 0.9999))
        np.testing.assert_array_equal(after["a"], params["a"])


def test_is_the_weighted_mean():
    after = ema.update({"a": jnp.float32(1)}, {"a": jnp.float32(3)}, jnp.float32(0.75))
    assert float(after["a"]) == 1.5


def test_stays_float32_for_parameters_of_less_precision():
    before = {"a": jnp.ones(3)}
    after = ema.update(before, {"a": jnp.ones(3, jnp.bfloat16) * 2}, jnp.float32(0.9999))
    assert after["a"].dtype == jnp.float32
    # 1 + 1e-4 is not a bfloat16
    np.testing.assert_allclose(after["a"], 1.0001, rtol=1e-6)
