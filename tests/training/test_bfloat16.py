"""Diffusion trained in bfloat16: what is kept stays float32, and the losses follow float32's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from oracles import equations
from tiny_training import OBJECTIVE

from jaxdiff.core.trees import cast_floating
from jaxdiff.families.stable_diffusion import SD
from jaxdiff.training.config import EMAConfig, OptimiserConfig
from jaxdiff.training.objectives.diffusion import diffusion_task, train_denoiser
from jaxdiff.training.optimiser import learning_rate, make_optimiser
from jaxdiff.training.step import initial_state, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS = 40
UNIT = 2.0**-8  # half the distance from 1 to the next bfloat16: the largest error of a rounding
# What only moves numbers, or is a name for operations that are counted themselves.
MOVES = {
    *("reshape", "transpose", "broadcast_in_dim", "slice", "squeeze", "concatenate", "gather"),
    *("pad", "copy", "stop_gradient", "select_n", "split", "jit", "custom_jvp_call", "rev", "max"),
}


def learner(dtype):
    return diffusion_task(OBJECTIVE, train_denoiser(SD, tiny_training.networks(dtype=dtype)))


def batch(step):
    rng = np.random.default_rng(step)
    ids = np.full((32, 5), 19)
    ids[:, 0], ids[:, 1] = 18, rng.integers(0, 18, 32)
    ramp = np.linspace(-1, 1, 8)[:, None, None] * np.ones((8, 8, 3))
    image = rng.choice([-1, 1], (32, 1, 1, 1)) * ramp[None]
    return {"image": image.astype(np.float32), "ids": ids}


@functools.cache
def trained(dtype):
    """The losses of a training, and its last state."""
    learn, config = learner(dtype), OptimiserConfig(learning_rate=1e-2, warmup_steps=5)
    transform = make_optimiser(config, STEPS)
    state = initial_state({k: jnp.asarray(v) for k, v in learn.init(2)}, transform)
    frozen = tiny_training.frozen()
    frozen = frozen._replace(weights=cast_floating(frozen.weights, dtype))
    schedule, average = learning_rate(config, STEPS), EMAConfig(decay=0.9)
    step = jax.jit(make_step(learn.loss, transform, schedule, average))
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, frozen, batch(i), jax.random.key(3))
        losses.append(float(metrics["loss"]))
    return np.asarray(losses), state


def roundings():
    """How many operations of the loss round their results to bfloat16."""
    learn = learner(jnp.bfloat16)
    traced = jax.make_jaxpr(learn.loss)(
        learn.shapes, tiny_training.frozen(), batch(0), jax.random.key(0)
    )
    return sum(
        e.primitive.name not in MOVES and any(v.aval.dtype == jnp.bfloat16 for v in e.outvars)
        for e in equations(traced.jaxpr)
    )


@pytest.mark.slow
def test_weights_averages_and_moments_stay_float32():
    _, state = trained(jnp.bfloat16)
    kept = (state.params, state.ema, state.opt_state)
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    assert len(floats) == 4 * len(state.params)  # weights, averages, and two moments
    # nor are they bfloat16 in disguise
    low = [np.asarray(x).view(np.uint32) & 0xFFFF for x in floats if x.size > 8]
    assert all(bits.any() for bits in low)


@pytest.mark.slow
def test_the_losses_are_those_of_float32_but_for_rounding():
    """|o - y|^2 moves by at most 2 |o - y| d + d^2 where the output o moves by d.

    Each of k roundings is off by anything up to UNIT of its number, UNIT / sqrt(3) on average;
    independent as they are, they add up to r = UNIT sqrt(k / 3) of the output, whose size is at
    most |y| + |o - y|, with |y| = 1 for noise and pictures of unit variance. The gradients are off
    by r too, and so is the way that the loss has come down by following them.
    """
    (exact, _), (rounded, _) = trained(jnp.float32), trained(jnp.bfloat16)
    r = UNIT * np.sqrt(roundings() / 3)
    root = np.sqrt(exact)
    d = r * (1 + root)
    allowed = 2 * root * d + d**2 + r * np.abs(exact[0] - exact)
    assert (np.abs(rounded - exact) <= allowed).all(), np.abs(rounded - exact) / allowed
    assert (rounded != exact).any()
    last = slice(-5, None)
    fallen = exact[:5].mean() - exact[last].mean()
    assert fallen > 2 * allowed[last].mean(), (fallen, allowed, exact)
