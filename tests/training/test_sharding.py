"""One training on meshes of all kinds: the same losses, and nobody holds more than their part."""

import functools

import jax
import numpy as np
import pytest
import tiny_training
from tiny_training import OBJECTIVE

from jaxdiff.parallel.mesh import make_mesh, place, replicate, shard_batch
from jaxdiff.parallel.rules import sharded_like, split_any
from jaxdiff.training.config import OptimiserConfig
from jaxdiff.training.objectives.diffusion import diffusion_learner
from jaxdiff.training.objectives.tuning import unet_only
from jaxdiff.training.optimiser import learning_rate, optimiser
from jaxdiff.training.state import initial_state
from jaxdiff.training.step import compile_step, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS = 6
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "2x2x2": (2, 2, 2), "tensor": (4, 1, 2)}


@functools.cache
def trained(sizes):
    """Losses of a few steps, and the state after them."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    frozen = tiny_training.frozen()
    learn = diffusion_learner(OBJECTIVE, unet_only(tiny_training.networks()))
    config = OptimiserConfig(learning_rate=1e-2, warmup_steps=1)
    transform = optimiser(config, STEPS)
    begin = functools.partial(initial_state, optimiser=transform)
    shapes = jax.eval_shape(begin, learn.shapes)
    parts = sharded_like(shapes, learn.shapes, learn.rules, mesh)
    params = {path: place(array, parts.params[path]) for path, array in learn.init(2)}
    state = jax.jit(begin, out_shardings=parts)(params)
    still = split_any(frozen, mesh)
    pure = make_step(learn.loss, transform, learning_rate(config, STEPS), 0.9)
    compiled = compile_step(pure, mesh, parts, still)
    frozen, base = jax.tree.map(place, frozen, still), replicate(jax.random.key(3), mesh)
    rng, losses = np.random.default_rng(0), []
    for _ in range(STEPS):
        ids = np.full((8, 5), 19)
        ids[:, 0], ids[:, 1] = 18, rng.integers(0, 18, 8)
        image = np.tanh(rng.normal(size=(8, 8, 8, 3))).astype(np.float32)
        state, metrics = compiled(
            state, frozen, shard_batch({"image": image, "ids": ids}, mesh), base
        )
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_the_loss_curve_is_that_of_one_device(sizes):
    expected, _ = trained((1, 1, 1))
    losses, _ = trained(sizes)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert len(set(losses)) == STEPS


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_weights_averages_and_moments_are_split(sizes):
    """The largest kernel lies in as many parts as fsdp and tensor make of it, whatever is of it."""
    _, state = trained(sizes)
    path = max(state.params, key=lambda path: state.params[path].size)
    ways = sizes[1] * sizes[2]
    for table in (state.params, state.ema, state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        leaf = table[path]
        assert leaf.addressable_shards[0].data.size * ways == leaf.size
