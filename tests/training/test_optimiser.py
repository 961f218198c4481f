"""The learning rate's three stretches, what is decayed and what is clipped."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.training.config import OptimiserConfig
from jaxdiff.training.optimiser import learning_rate, matrices, optimiser

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONFIG = OptimiserConfig(
    learning_rate=0.1, warmup_steps=10, decay="linear", decay_fraction=0.2, final_fraction=0.5
)


def rates(config: OptimiserConfig, steps: int = 100) -> np.ndarray:
    schedule = learning_rate(config, steps)
    return np.array([schedule(jnp.int32(i)) for i in range(steps + 1)], np.float64)


def test_warm_up_is_linear_from_the_first_step_on():
    np.testing.assert_allclose(rates(CONFIG)[:10], 0.01 * np.arange(1, 11), rtol=1e-6)


def test_constant_between_warm_up_and_decay():
    np.testing.assert_allclose(rates(CONFIG)[10:81], 0.1, rtol=1e-6)


def test_linear_decay_reaches_the_final_fraction():
    np.testing.assert_allclose(rates(CONFIG)[80:], np.linspace(0.1, 0.05, 21), rtol=1e-6)


def test_cosine_decay_is_half_way_in_the_middle():
    config = dataclasses.replace(CONFIG, decay="cosine", final_fraction=0.0)
    np.testing.assert_allclose(rates(config)[[80, 90, 100]], [0.1, 0.05, 0], atol=1e-7)


def test_a_decay_that_begins_with_the_warm_up_reaches_its_end():
    config = dataclasses.replace(CONFIG, decay_fraction=1.0)
    np.testing.assert_allclose(rates(config)[[9, 10, 55, 100]], [0.1, 0.1, 0.075, 0.05], rtol=1e-6)


def test_without_decay_and_warm_up_the_rate_is_constant():
    config = dataclasses.replace(CONFIG, warmup_steps=0, decay_fraction=0)
    np.testing.assert_allclose(rates(config), 0.1, rtol=1e-6)


def test_only_matrices_decay():
    config = dataclasses.replace(CONFIG, warmup_steps=0, weight_decay=0.3)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.float32(1)}
    transform = optimiser(config, 100)
    zero = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
    updates, _ = transform.update(zero, transform.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.3, rtol=1e-6)
    assert not updates["bias"].any()
    assert not updates["scale"].any()
    assert matrices(params) == {"kernel": True, "bias": False, "scale": False}


@pytest.mark.parametrize(("size", "expected"), [(0.3, 0.3), (30.0, 1.0)])
def test_only_large_gradients_are_clipped(size, expected):
    clip = optax.clip_by_global_norm(CONFIG.clip_norm)
    grads = {"a": jnp.full(4, size / 2)}
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(optax.tree.norm(clipped), expected, rtol=1e-6)


def test_scaling_a_large_gradient_changes_nothing():
    transform = optimiser(CONFIG, 100)
    params = {"a": jnp.ones((3, 3))}
    state = transform.init(params)
    grads = {"a": jnp.arange(1.0, 10.0).reshape(3, 3)}
    first, _ = transform.update(grads, state, params)
    second, _ = transform.update({"a": 7 * grads["a"]}, state, params)
    np.testing.assert_allclose(first["a"], second["a"], rtol=1e-5)
