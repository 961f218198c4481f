"""The learning rate's three stretches, what is decayed and what is clipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.training.config import EMAConfig, OptimiserConfig
from jaxdiff.training.config.optimiser import OPTIMISERS
from jaxdiff.training.optimiser import (
    learning_rate,
    lr_multipliers,
    make_optimiser,
    weight_decay_mask,
)
from jaxdiff.training.step import initial_state, make_step, stop_gradients_for

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONFIG = OptimiserConfig(
    learning_rate=0.1, warmup_steps=10, decay="linear", decay_fraction=0.2, min_lr_ratio=0.5
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
    config = dataclasses.replace(CONFIG, decay="cosine", min_lr_ratio=0.0)
    np.testing.assert_allclose(rates(config)[[80, 90, 100]], [0.1, 0.05, 0], atol=1e-7)


def test_a_decay_that_begins_with_the_warm_up_reaches_its_end():
    config = dataclasses.replace(CONFIG, decay_fraction=1.0)
    np.testing.assert_allclose(rates(config)[[9, 10, 55, 100]], [0.1, 0.1, 0.075, 0.05], rtol=1e-6)


def test_without_decay_and_warm_up_the_rate_is_constant():
    config = dataclasses.replace(CONFIG, warmup_steps=0, decay_fraction=0, min_lr_ratio=0)
    np.testing.assert_allclose(rates(config), 0.1, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_stored_positions_stay_as_they_are(name):
    """Their gradient is zero, and weight decay passes them over."""
    params = {"pos_embed.pos_embed": jnp.ones((1, 4, 8)), "a.kernel": jnp.ones((4, 8))}
    config = OptimiserConfig(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.1)
    optimiser = make_optimiser(config, 10)
    gradients = {"pos_embed.pos_embed": jnp.zeros((1, 4, 8)), "a.kernel": jnp.ones((4, 8))}
    updates, _ = optimiser.update(gradients, optimiser.init(params), params, step=jnp.int32(0))
    assert not np.any(updates["pos_embed.pos_embed"])
    assert np.all(updates["a.kernel"])


def test_only_matrices_decay():
    config = dataclasses.replace(CONFIG, warmup_steps=0, weight_decay=0.3)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.float32(1)}
    transform = make_optimiser(config, 100)
    zero = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
    updates, _ = transform.update(zero, transform.init(params), params, step=jnp.int32(0))
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.3, rtol=1e-6)
    assert not updates["bias"].any()
    assert not updates["scale"].any()
    assert weight_decay_mask(params) == {"kernel": True, "bias": False, "scale": False}


@pytest.mark.parametrize(("size", "expected"), [(0.3, 0.3), (30.0, 1.0)])
def test_only_large_gradients_are_clipped(size, expected):
    clip = optax.clip_by_global_norm(CONFIG.clip_norm)
    grads = {"a": jnp.full(4, size / 2)}
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(optax.tree.norm(clipped), expected, rtol=1e-6)


def test_scaling_a_large_gradient_changes_nothing():
    transform = make_optimiser(CONFIG, 100)
    params = {"a": jnp.ones((3, 3))}
    state = transform.init(params)
    grads = {"a": jnp.arange(1.0, 10.0).reshape(3, 3)}
    first, _ = transform.update(grads, state, params, step=jnp.int32(0))
    second, _ = transform.update({"a": 7 * grads["a"]}, state, params, step=jnp.int32(0))
    np.testing.assert_allclose(first["a"], second["a"], rtol=1e-5)


CONSTANT = OptimiserConfig(warmup_steps=0, decay_fraction=0, learning_rate=0.02, clip_norm=1e9)
SHAPES = {
    "text.layer.kernel": (6, 4),
    "unet.conv1.kernel": (3, 3, 2, 5),
    "unet.conv_in.kernel": (3, 3, 2, 4),
    "unet.bias": (4,),
}


def arrays(seed: int) -> dict[str, jnp.ndarray]:
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {p: jax.random.normal(k, s) for k, (p, s) in zip(keys, SHAPES.items(), strict=True)}


def updates_of(config, transform=None, steps=3):
    """The updates of a few steps with given gradients."""
    transform = optax.with_extra_args_support(transform or make_optimiser(config, 100))
    params = arrays(0)
    state, found = transform.init(params), []
    for i in range(steps):
        update, state = transform.update(arrays(i + 1), state, params, step=jnp.int32(i))
        params = optax.apply_updates(params, update)
        found.append(update)
    return found


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (CONSTANT, optax.adamw(0.02, 0.9, 0.99, weight_decay=0.01, mask=weight_decay_mask)),
        (
            dataclasses.replace(CONSTANT, name="lion"),
            optax.lion(0.02, 0.9, 0.99, weight_decay=0.01, mask=weight_decay_mask),
        ),
        (
            dataclasses.replace(CONSTANT, name="adafactor", weight_decay=0),
            optax.adafactor(0.02, multiply_by_parameter_scale=False),
        ),
    ],
    ids=["adamw", "lion", "adafactor"],
)
def test_updates_are_those_of_the_published_rule(config, theirs):
    for ours, expected in zip(updates_of(config), updates_of(config, theirs), strict=True):
        for path, update in ours.items():
            np.testing.assert_allclose(update, expected[path], rtol=1e-5, atol=1e-8)


def test_muon_turns_kernels_into_orthogonal_steps_of_the_size_of_adam():
    config = dataclasses.replace(CONSTANT, name="muon", weight_decay=0)
    (muon,) = updates_of(config, steps=1)
    for path in ("text.layer.kernel", "unet.conv1.kernel"):
        matrix = np.asarray(muon[path]).reshape(-1, SHAPES[path][-1])
        sizes = np.linalg.svd(matrix, compute_uv=False)
        # five Newton-Schulz steps bring singular values near 1, not onto it
        wanted = 0.02 * 0.2 * np.sqrt(max(matrix.shape))
        assert 0.6 < sizes.min() / wanted < sizes.max() / wanted < 1.3
    undecayed = dataclasses.replace(CONSTANT, weight_decay=0)
    (adam,) = updates_of(undecayed, steps=1)
    for path in ("unet.conv_in.kernel", "unet.bias"):
        np.testing.assert_allclose(muon[path], adam[path], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_learns_and_leaves_frozen_weights_alone(name):
    groups = (("^text", 0.0), (r"conv1", 0.5))
    rate = 0.02 if name == "lion" else 0.1
    config = dataclasses.replace(CONSTANT, name=name, lr_multipliers=groups, learning_rate=rate)
    factor = lr_multipliers(SHAPES, config)
    assert factor == {
        "text.layer.kernel": 0.0,
        "unet.conv1.kernel": 0.5,
        "unet.conv_in.kernel": 1.0,
        "unet.bias": 1.0,
    }
    goal = arrays(5)

    def loss(params, frozen, batch, key):
        return sum(jnp.mean((params[p] - goal[p]) ** 2) for p in params), {}

    rule = make_optimiser(config, 100, factor)
    held = stop_gradients_for(loss, {"text.layer.kernel"})
    step = jax.jit(make_step(held, rule, learning_rate(config, 100), EMAConfig(decay=0.9)))
    state = initial_state(arrays(0), rule)
    losses = []
    for _ in range(60):
        state, metrics = step(state, None, {"x": jnp.zeros(1)}, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    still = float(jnp.mean((arrays(0)["text.layer.kernel"] - goal["text.layer.kernel"]) ** 2))
    assert losses[-1] - still < 0.5 * (losses[0] - still)
    np.testing.assert_array_equal(state.params["text.layer.kernel"], arrays(0)["text.layer.kernel"])
    # nothing of a frozen weight's size is kept for it
    kept = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    assert (6, 4) not in kept


def test_a_factor_scales_the_updates():
    config = dataclasses.replace(CONSTANT, lr_multipliers=(("conv", 0.25),))
    (plain,), (scaled,) = (
        updates_of(CONSTANT, steps=1),
        updates_of(config, make_optimiser(config, 100, lr_multipliers(SHAPES, config)), steps=1),
    )
    for path, update in scaled.items():
        by = 0.25 if "conv" in path else 1.0
        np.testing.assert_allclose(update, by * np.asarray(plain[path]), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "optimiser.name: got 'adam', .* .did you mean 'adamw'"),
        (
            {"name": "adafactor", "beta1": 0.5},
            "beta1: got 0.5 with optimiser.name adafactor",
        ),
        (
            {"momentum": 0.5},
            "momentum: got 0.5 with optimiser.name adamw",
        ),
        (
            {"lr_multipliers": (("(", 1.0),)},
            "lr_multipliers: got '\\(', expected a regular expression",
        ),
        (
            {"lr_multipliers": (("a", -1.0),)},
            "lr_multipliers: got -1.0, expected a number of at least 0",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        OptimiserConfig(**fields)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("decoder", 0.1),), "got 'decoder', which matches no weight"),
        (((".", 0.0),), "got nothing that is trained"),
    ],
)
def test_groups_that_fit_no_weight_are_refused(groups, message):
    with pytest.raises(InputError, match=message):
        lr_multipliers(SHAPES, OptimiserConfig(lr_multipliers=groups))
