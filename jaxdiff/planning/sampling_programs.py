"""The programs that generate a batch: the text encoders, the sampling loop and the decoder.

Each is traced as the pipeline runs it, from shapes that say where the weights lie.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from jaxdiff.core.types import PyTree
from jaxdiff.guidance.base import GuidanceScales
from jaxdiff.models.build import param_dict
from jaxdiff.models.latent_codec import upcast_fp16
from jaxdiff.parallel.mesh import batch_sharding, replicated
from jaxdiff.parallel.sharding import infer_shardings
from jaxdiff.pipeline.compiled_model import (
    NO_TARGETS,
    ConditioningPair,
    Networks,
    StartLevel,
    decode_images,
    denoise_steps,
    init_latents,
)
from jaxdiff.pipeline.conditioning import encode_prompts
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.planning.sampled_model import S, SampledModel, SamplingOptions
from jaxdiff.profiling.flops import forward_flops
from jaxdiff.samplers.base import get_sampler

TEXT_ENCODERS, LOOP, DECODER = "text_encoders", "loop", "decoder"  # the programs


class Program(NamedTuple):
    """One of the programs, for any number of images."""

    weights: PyTree  # as shapes that say where they lie
    trace: Callable[[int], Any]  # images -> the traced program, whose first arguments are `weights`
    flops: Callable[[int], float]  # images -> model FLOPs
    runs: int = 1  # how often its body runs for a batch


def sampling_programs(
    options: SamplingOptions, model: SampledModel, layout: OnMesh
) -> dict[str, Program]:
    """The programs of a model by name, in the order in which they run."""
    encoders = tuple(layout.split(each)[1] for each in model.text_encoders.values())
    texts = place_weights(encoders, layout.mesh)
    network = place_weights(param_dict(model.network.module), layout.mesh)
    codec = place_weights(layout.split(_decoder(model))[1], layout.mesh)
    programs = {
        TEXT_ENCODERS: Program(
            texts,
            lambda n: trace_text_encoders(options, model, texts, n, layout),
            lambda n: n * text_flops(options, model),
        ),
        LOOP: Program(
            network,
            lambda n: trace_loop(options, model, network, n, layout),
            lambda n: n * loop_flops(options, model),
            cast(int, options.steps),
        ),
        DECODER: Program(
            codec,
            lambda n: trace_decoder(options, model, codec, n, layout),
            lambda n: n * decoder_flops(options, model),
        ),
    }
    return programs if model.text_encoders else {n: programs[n] for n in (LOOP, DECODER)}


def trace_loop(
    options: SamplingOptions,
    model: SampledModel,
    params: Mapping[str, Any],
    batch_size: int,
    layout: OnMesh,
) -> Any:
    """The traced loop for `batch_size` images, with weights that say where they lie."""
    guidance, name = model.rule(options), model.with_defaults(options).sampler
    sampler = get_sampler(cast(str, name)).for_schedule(model.schedule)
    rule = jax.tree.map(np.float32, guidance)
    grid = model.grid(options)
    grid = jax.tree.map(lambda leaf: S((batch_size, *leaf.shape[1:]), leaf.dtype), grid)
    noise = model.latents(options, batch_size)
    init = functools.partial(init_latents, sampler=sampler)
    carry = jax.eval_shape(init, noise, None, StartLevel(grid.init_noise_sigma), rule)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    guidance_scales = GuidanceScales(cast(Any, S((batch_size,), jnp.float32)))
    streams = len(guidance.streams)
    conditioning = ConditioningPair(cast(Any, model.conditioning(noise, batch_size, streams)))
    run = functools.partial(
        denoise_steps,
        networks=Networks(layout.network(model.network)),
        image_processor=None,
        sampler=sampler,
    )

    batch, whole = _shardings(layout)
    arguments = (
        Networks(params),
        place_shapes(rule, whole),
        *place_shapes((carry, conditioning, guidance_scales, grid, keys), batch),
        None,
        NO_TARGETS,
        *place_shapes((np.int32(0), np.int32(0)), whole),
    )
    return layout.jit(run, (), arguments).trace(*jax.tree.leaves(arguments))


def _shardings(layout: OnMesh) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """The shardings of arrays of a batch, and of arrays that every device has whole."""

    def batch(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: batch_sharding(layout.mesh), tree)

    def whole(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: replicated(layout.mesh), tree)

    return batch, whole


def trace_text_encoders(
    options: SamplingOptions,
    model: SampledModel,
    params: tuple[PyTree, ...],
    batch_size: int,
    layout: OnMesh,
) -> Any:
    """The traced text encoders for the prompts of `batch_size` images."""
    graphs = tuple(layout.split(each)[0] for each in model.text_encoders.values())
    run = functools.partial(encode_prompts, encoders=graphs, family=model.family, skip=0)
    prompts = place_shapes(model.prompts(options, batch_size), _shardings(layout)[0])
    return layout.jit(run, (), (params, prompts)).trace(*jax.tree.leaves((params, prompts)))


def trace_decoder(
    options: SamplingOptions, model: SampledModel, params: PyTree, batch_size: int, layout: OnMesh
) -> Any:
    """The traced decoder for the latents of `batch_size` images, without tiles."""
    run = functools.partial(decode_images, codec=layout.split(_decoder(model))[0])
    latents = place_shapes(model.latents(options, batch_size), _shardings(layout)[0])
    return layout.jit(run, (), (params, latents)).trace(*jax.tree.leaves((params, latents)))


def text_flops(options: SamplingOptions, model: SampledModel) -> float:
    """Of the text encoders, for all streams of one image."""
    graphs, params = zip(*(nnx.split(each) for each in model.text_encoders.values()), strict=True)
    encoders = tuple(functools.partial(nnx.merge, graph) for graph in graphs)
    run = functools.partial(encode_prompts, encoders=encoders, family=model.family, skip=0)
    return forward_flops(run, params, model.prompts(options, 1))


def loop_flops(options: SamplingOptions, model: SampledModel) -> float:
    """Of the network in one step, for all streams of one image."""
    network, x = model.network, model.latents(options, 1)
    arguments = x, S((1,), jnp.int32), model.conditioning(x, 1)
    streams = len(model.rule(options).streams)
    return streams * forward_flops(network, param_dict(network.module), *arguments)


def decoder_flops(options: SamplingOptions, model: SampledModel) -> float:
    """Of the decoder, for one image."""
    graph, params = nnx.split(_decoder(model))
    run = functools.partial(decode_images, codec=functools.partial(nnx.merge, graph))
    return forward_flops(run, params, model.latents(options, 1))


def _decoder(model: SampledModel) -> Any:
    """The codec as the pipeline computes with it."""
    return upcast_fp16(cast(Any, model.codec))


def place_weights(weights: PyTree, mesh: Mesh) -> Any:
    """Weights as shapes that say where they lie on `mesh`."""
    return place_shapes(weights, lambda tree: infer_shardings(tree, mesh))


def place_shapes(tree: PyTree, shardings: Callable[[PyTree], PyTree]) -> Any:
    """The arrays or shapes of `tree` as shapes with the shardings that `shardings` gives them."""
    return jax.tree.map(
        lambda leaf, place: S(
            np.shape(leaf),
            jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True),
            sharding=place,
        ),
        tree,
        shardings(tree),
    )


def shard_bytes(shapes: PyTree) -> float:
    """Bytes of one device's shards of arrays, given as shapes that say where they lie."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(shapes)
        )
    )


def used_bytes(traced: Any, weights: PyTree) -> float:
    """Bytes of a device's shards of those `weights`, a traced program's first, that it depends on.

    Others are no arguments of what is compiled, such as the VAE's encoder in the decoder.
    """
    program = traced.jaxpr.jaxpr
    _, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    leaves = jax.tree.leaves(weights)
    return shard_bytes([leaf for leaf, own in zip(leaves, used, strict=False) if own])
