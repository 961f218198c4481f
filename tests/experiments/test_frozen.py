"""Frozen weights are read once, each device holds its share, and sampling uploads none again."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxdiff.checkpoints import pipelines
from jaxdiff.experiments.base_model import frozen_shapes, load_base_model, place_frozen
from jaxdiff.experiments.experiment import shard_or_replicate
from jaxdiff.experiments.sample_grid import make_sampler, sampling_inputs
from jaxdiff.parallel.mesh import make_mesh
from jaxdiff.parallel.sharding import infer_shardings
from jaxdiff.training.config import DiffusionObjective
from jaxdiff.training.objectives.diffusion import LatentDiffusion, train_denoiser


def test_frozen_weights_are_placed_once_and_sampled_with(tmp_path, monkeypatch):
    tiny.write_tiny(tmp_path)
    base = load_base_model(DiffusionObjective(pipeline=str(tmp_path)))
    read, reader = [], pipelines.read_component

    def counted(folder, **options):
        read.append(folder.name)
        return reader(folder, **options)

    monkeypatch.setattr(pipelines, "read_component", counted)
    networks = base.abstract_networks(jnp.float32)
    tokenizer = base.caption_tokenizer()
    shapes = frozen_shapes(base, networks, jnp.float32)
    places = infer_shardings(shapes, make_mesh(data=1, fsdp=4, tensor=2))
    frozen = place_frozen(base, jnp.float32, places, base.null_ids(tokenizer))
    assert sorted(read) == sorted(networks)
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(frozen):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    share = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        shapes,
        places,
    )
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert set(held.values()) == {sum(jax.tree.leaves(share))}
    assert sum(jax.tree.leaves(share)) < 0.5 * whole
    model = LatentDiffusion(train_denoiser(base.family, networks), "epsilon")
    schedule = base.objective.schedule
    generate = jax.jit(make_sampler(model, schedule, steps=1, guidance_scale=2.0))
    side = 8 * base.codec.config.downscale
    inputs = shard_or_replicate(tokenizer(["a star"] * 8) | sampling_inputs(base, side, 8))
    params = frozen.weights[base.family.network]
    generate(params, frozen, inputs)  # compiles
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        images = generate(params, frozen, inputs)
    assert np.isfinite(images).all()
    assert sorted(read) == sorted(networks)
