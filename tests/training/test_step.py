"""The step: pure, donated, its draws fixed by (base key, step), the same on 8 devices as on 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.parallel.mesh import data_mesh, replicate, shard_batch
from jaxdiff.training.config import EMAConfig
from jaxdiff.training.step import TrainState, compile_step, initial_state, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
SCHEDULE = optax.constant_schedule(0.1)
OPTIMISER = optax.adamw(SCHEDULE)


def noisy_loss(params, frozen, batch, key):
    """A regression on noisy inputs; the noise shows which key was used."""
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    error = x @ params["w"] + params["b"][None] - frozen["y"][None]
    value = jnp.mean(error**2)
    return value, {"mse": value}


def fresh_state() -> TrainState:
    params = {"w": jax.random.normal(jax.random.key(0), (3, 2)), "b": jnp.zeros(2)}
    return initial_state(params, OPTIMISER)


FROZEN = {"y": np.array([1.0, -1.0], np.float32)}
BATCH = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)}
STEP = make_step(noisy_loss, OPTIMISER, SCHEDULE, EMAConfig(decay=0.99))
BASE = jax.random.key(7)


def test_state_is_not_mutated():
    state = fresh_state()
    before = jax.tree.map(np.array, state)
    STEP(state, FROZEN, BATCH, BASE)
    jax.tree.map(np.testing.assert_array_equal, before, state)


def test_same_inputs_same_outputs_and_another_key_others():
    state = fresh_state()
    first, _ = STEP(state, FROZEN, BATCH, BASE)
    second, _ = STEP(state, FROZEN, BATCH, BASE)
    other, _ = STEP(state, FROZEN, BATCH, jax.random.key(8))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not np.array_equal(first.params["w"], other.params["w"])


def test_each_step_draws_with_its_own_key():
    state = fresh_state()
    _, here = STEP(state, FROZEN, BATCH, BASE)
    _, there = STEP(state._replace(step=jnp.int32(1)), FROZEN, BATCH, BASE)
    expected, _ = noisy_loss(state.params, FROZEN, BATCH, jax.random.fold_in(BASE, 1))
    assert float(here["loss"]) != float(there["loss"])
    np.testing.assert_allclose(there["loss"], expected, rtol=1e-6)


def test_metrics_and_average():
    state = fresh_state()
    after, metrics = STEP(state, FROZEN, BATCH, BASE)
    assert set(metrics) == {
        "loss",
        "mse",
        "grad_norm",
        "param_norm",
        "learning_rate",
        "nonfinite_steps",
    }
    assert float(metrics["nonfinite_steps"]) == 0
    assert int(after.step) == 1
    assert float(metrics["learning_rate"]) == np.float32(0.1)
    # the first decay is 1 / 10
    expected = 0.1 * np.asarray(state.params["w"]) + 0.9 * np.asarray(after.params["w"])
    np.testing.assert_allclose(after.ema["w"], expected, rtol=1e-5)


def test_limit_applies_to_the_updated_parameters():
    step = make_step(
        noisy_loss,
        OPTIMISER,
        SCHEDULE,
        EMAConfig(decay=0.99),
        lambda p: jax.tree.map(jnp.zeros_like, p),
    )
    after, _ = step(fresh_state(), FROZEN, BATCH, BASE)
    assert not after.params["w"].any()


@pytest.mark.parametrize("where", ["loss", "gradient", "parameters"])
def test_what_is_not_finite_changes_nothing_but_the_count(where):
    def loss(params, frozen, batch, key):
        value, parts = noisy_loss(params, frozen, batch, key)
        bad = {"loss": jnp.nan, "gradient": 0.0, "parameters": 0.0}[where]
        # the square root of 0 times 0: the value is 0, its derivative is not a number
        bent = jnp.sqrt(0 * params["b"][0]) if where == "gradient" else 0.0
        return value + bad + bent, parts

    rule = optax.sgd(jnp.inf) if where == "parameters" else OPTIMISER
    step = make_step(loss, rule, SCHEDULE, EMAConfig(decay=0.99))
    state = initial_state(fresh_state().params, rule)
    after, metrics = jax.jit(step)(state, FROZEN, BATCH, BASE)
    assert float(metrics["nonfinite_steps"]) == 1
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=state.step), state)


def run(devices: int, steps: int = 5) -> TrainState:
    mesh = data_mesh(jax.devices()[:devices])
    state, frozen, base = (replicate(tree, mesh) for tree in (fresh_state(), FROZEN, BASE))
    compiled = compile_step(STEP, mesh)
    batch = shard_batch(BATCH, mesh)
    for _ in range(steps):
        state, _ = compiled(state, frozen, batch, base)
    return state


def test_eight_devices_agree_with_one():
    one, eight = run(1), run(8)
    assert len(eight.params["w"].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, eight)


def test_compiled_step_takes_over_the_buffers():
    mesh = data_mesh()
    state = replicate(fresh_state(), mesh)
    after, _ = compile_step(STEP, mesh)(
        state, replicate(FROZEN, mesh), shard_batch(BATCH, mesh), replicate(BASE, mesh)
    )
    assert state.params["w"].is_deleted()
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.opt_state[0].mu["w"])
    assert not after.params["w"].is_deleted()


def test_shapes_are_known_without_drawing():
    params = {"w": jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)}
    shapes = jax.eval_shape(lambda params: initial_state(params, OPTIMISER), params)
    assert shapes.ema["w"].shape == (3, 2)
    assert shapes.ema["w"].dtype == jnp.float32
