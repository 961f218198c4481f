"""One training on meshes of all kinds: the same losses, and nobody holds more than their part."""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import tiny_training
from tiny_training import OBJECTIVE

from jaxdiff.families.stable_diffusion import SD
from jaxdiff.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.parallel.mesh import (
    batch_sharding,
    device_put_global,
    make_mesh,
    replicate,
    shard_batch,
)
from jaxdiff.parallel.sharding import shardings
from jaxdiff.training.config import CLIPObjective, EMAConfig, OptimiserConfig
from jaxdiff.training.objectives.clip import clip_task
from jaxdiff.training.objectives.diffusion import diffusion_task, train_denoiser
from jaxdiff.training.program import make_program

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS = 6
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "2x2x2": (2, 2, 2), "tensor": (4, 1, 2)}
# The mesh that splits by all axes stands for those that split by one.
BY_MESH = [
    pytest.param(sizes, id=name, marks=() if name == "2x2x2" else pytest.mark.slow)
    for name, sizes in MESHES.items()
]
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
CONTRAST = CLIPObjective(
    text=CLIPTextConfig(
        vocab_size=20, num_attention_heads=2, max_position_embeddings=6, eos_token_id=19, **SIZES
    ),
    vision=CLIPVisionConfig(num_attention_heads=2, image_size=8, patch_size=4, **SIZES),
    projection_dim=4,
)


def program_on(mesh, frozen, remat="none", *, reshard=False):
    objective = dataclasses.replace(OBJECTIVE, remat=remat)
    return make_program(
        diffusion_task(objective, train_denoiser(SD, tiny_training.networks(objective))),
        frozen,
        mesh,
        steps=STEPS,
        optimiser=OptimiserConfig(learning_rate=1e-2, warmup_steps=1),
        ema=EMAConfig(decay=0.9),
        reshard_after_forward=reshard,
    )


@functools.cache
def trained(sizes, remat="none", *, reshard=False):
    """Losses of a few steps, and the state after them."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    frozen = tiny_training.frozen()
    program = program_on(mesh, frozen, remat, reshard=reshard)
    state = program.init(2)
    frozen, base = (
        jax.tree.map(device_put_global, frozen, program.frozen_shardings),
        replicate(jax.random.key(3), mesh),
    )
    rng, losses = np.random.default_rng(0), []
    for _ in range(STEPS):
        ids = np.full((8, 5), 19)
        ids[:, 0], ids[:, 1] = 18, rng.integers(0, 18, 8)
        image = np.tanh(rng.normal(size=(8, 8, 8, 3))).astype(np.float32)
        state, metrics = program.step(
            state, frozen, shard_batch({"image": image, "ids": ids}, mesh), base
        )
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("sizes", BY_MESH)
def test_the_loss_curve_is_that_of_one_device(sizes):
    expected, _ = trained((1, 1, 1))
    losses, _ = trained(sizes)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert len(set(losses)) == STEPS


@pytest.mark.parametrize("remat", ["blocks", pytest.param("products", marks=pytest.mark.slow)])
def test_weights_that_are_gathered_again_train_as_those_that_are_kept(remat):
    expected, _ = trained((1, 1, 1))
    losses, _ = trained((2, 2, 2), remat, reshard=True)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_the_backward_pass_gathers_again_what_blocks_need():
    """As the compiler sees it: each weight of a block once more, and nothing of a frozen network.

    What the VAE and the text encoder gave is kept.
    """

    def gathers(*, reshard):
        mesh = make_mesh(1, 8, 1)
        program = program_on(mesh, tiny_training.frozen(), "blocks", reshard=reshard)
        batch = {
            "image": jax.ShapeDtypeStruct((8, 8, 8, 3), np.float32),
            "ids": jax.ShapeDtypeStruct((8, 5), np.int32),
        }
        key = jax.eval_shape(lambda: jax.random.key(0))
        frozen = jax.eval_shape(tiny_training.frozen)
        lowered = program.step.lower(program.state_shapes, frozen, batch, key)
        shapes = re.findall(r"= f32\[(\S+)\]\S+ all-gather\(", lowered.compile().as_text())
        return collections.Counter(shapes)

    kept, again = gathers(reshard=False), gathers(reshard=True)
    for kernel in ("3,3,8,8", "32,8", "8,64"):  # convolutions, both ways of perceptrons
        assert kept[kernel]
        assert again[kernel] == 2 * kept[kernel]
    assert again["20,8"] == kept["20,8"] == 1  # of the text encoder


@pytest.mark.parametrize("sizes", BY_MESH)
def test_weights_averages_and_moments_are_split(sizes):
    """The largest kernel lies in as many parts as fsdp and tensor make of it, whatever is of it."""
    _, state = trained(sizes)
    path = max(state.params, key=lambda path: state.params[path].size)
    ways = sizes[1] * sizes[2]
    for table in (state.params, state.ema, state.opt_state[1].mu, state.opt_state[1].nu):
        leaf = table[path]
        assert leaf.addressable_shards[0].data.size * ways == leaf.size


@pytest.mark.parametrize("sizes", BY_MESH)
def test_captions_are_told_from_those_of_all_devices(sizes):
    """CLIP's loss of 8 pairs, one or two on a device, and its gradients are those of one device.

    A device that knew its own pair alone would lose nothing.
    """
    learn = clip_task(CONTRAST)
    params = {path: np.asarray(array) for path, array in learn.init(0)}
    rng = np.random.default_rng(1)
    ids = np.full((8, 6), 19)
    ids[:, 0], ids[:, 1] = 18, np.arange(8)
    batch = {"image": rng.uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32), "ids": ids}

    def found(mesh):
        parts = shardings(learn.shapes, learn.rules, mesh)
        placed = {path: device_put_global(array, parts[path]) for path, array in params.items()}
        gradient = jax.jit(
            lambda p, b: jax.value_and_grad(learn.loss, has_aux=True)(p, {}, b, jax.random.key(0)),
            in_shardings=(parts, batch_sharding(mesh)),
        )
        (loss, _), grads = gradient(placed, shard_batch(batch, mesh))
        return float(loss), jax.device_get(grads)

    expected, alone = found(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    loss, grads = found(make_mesh(*sizes))
    assert loss > 1
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    size = max(np.abs(grad).max() for grad in alone.values())
    for path, grad in alone.items():
        np.testing.assert_allclose(grads[path], grad, rtol=1e-4, atol=1e-6 * size, err_msg=path)
