"""Plans of the sampling loop: `generate.py --plan TOPOLOGY ... --model MODEL`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.timestep_grids import make_grid
from jaxdiff.core.types import PyTree, dtype_of
from jaxdiff.core.validate import positive
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.guidance.base import Guidance, GuidanceScales, parse
from jaxdiff.models.build import param_dict
from jaxdiff.models.latent_codec import LatentCodec
from jaxdiff.parallel.mesh import batch_sharding, replicated, sampling_mesh
from jaxdiff.parallel.sharding import infer_shardings
from jaxdiff.pipeline.compiled_model import (
    NO_TARGETS,
    ConditioningPair,
    Networks,
    StartLevel,
    denoise_steps,
    init_latents,
)
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.planning.compiling import CompiledProgram, compile_traced
from jaxdiff.planning.max_batch import max_batch_size
from jaxdiff.planning.published_models import published_model
from jaxdiff.planning.report import Plan, Planner
from jaxdiff.planning.topology import Topology, topology_devices
from jaxdiff.profiling.flops import forward_flops
from jaxdiff.samplers.base import get_sampler

PREDICTION_TYPE = "epsilon"  # costs as much as any other
S = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Compile the sampling loop for absent TPUs or GPUs; report memory and time.

    The text encoder and the VAE, which run once for each image, are not in it. Without a mesh
    every chip runs the same program on its own images, so nothing is sent.
    """

    plan: tuple[str, ...]
    """Topologies, such as v5e:2x4 or h200:8."""
    model: str
    """A diffusers folder, whose weights are not read, or a Hub repository."""
    batch_size: int = 8
    """Images per batch, over all devices together."""
    steps: int = 50
    """Number of denoising steps."""
    sampler: str = "dpmpp-2m"
    """Sampler; `jaxdiff generate --help` lists them, and the guidance rules."""
    guidance: str = "cfg"
    """Guidance rule."""
    guidance_scale: float = 7.5
    """Guidance scale; 1 runs one stream."""
    height: int | None = None
    """Height in pixels. Default: the size that the model was trained at."""
    width: int | None = None
    """Width in pixels."""
    mesh: str | None = None
    """Share weights and work between devices, such as fsdp=4,tensor=2 or guidance=2."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    find_max_batch: bool = True
    """Also find the largest batch that fits."""
    json: bool = False
    """Print one JSON object."""


class SampledModel(NamedTuple):
    """What the loop runs, and what its shapes depend on."""

    network: Any  # the adapter
    codec: LatentCodec
    num_tokens: int  # of a prompt within one window of the text encoders


def sampled_model(options: SamplingOptions) -> SampledModel:
    """The model of `options` as shapes; raises InputError."""
    dtype = dtype_of(options.dtype)
    family, modules = published_model(options.model, dtype=dtype, param_dtype=dtype)
    network = family.adapter(modules[family.network], PREDICTION_TYPE)
    return SampledModel(network, family.codec(modules), family.num_tokens(modules))


def sampling_planner(options: SamplingOptions) -> Planner:
    """The planner of the sampling loop with `options`; raises InputError."""
    model = sampled_model(options)
    positive("steps", options.steps)
    positive("batch_size", options.batch_size)

    def plan(topology: Topology) -> Plan:
        devices = topology_devices(topology)
        # Without a mesh, one chip tells all: it has all weights, and shares nothing.
        shared = devices if options.mesh else devices[:1]
        mesh = sampling_mesh(options.mesh or {}, shared)
        layout, groups = OnMesh(mesh), topology.num_chips // mesh.size
        weights = param_dict(model.network.module)
        params = place_shapes(weights, lambda tree: infer_shardings(tree, mesh))

        def compiled(each: int) -> CompiledProgram:
            traced = trace_loop(options, model, params, each * layout.num_shards, layout)
            return compile_traced(traced, topology)

        shards = layout.num_shards * groups
        each = -(-options.batch_size // shards)
        first, max_batch = compiled(each), None
        if options.find_max_batch:
            measured = {each: first.total}
            fitting = max_batch_size(lambda n: compiled(n).total, measured, topology.chip.hbm, 1)
            max_batch = shards * fitting
        size = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in params.values()
        )
        return Plan(
            topology=topology,
            batch_size=each * shards,
            compiled=first._replace(
                unknown_loops=first.unknown_loops - 1
            ),  # that over the steps: one of them
            model_flops=_flops(options, model, each * shards) / topology.num_chips,
            state_bytes={"weights": float(size)},
            steps=options.steps,
            max_batch_size=max_batch,
        )

    return plan


def _latents(
    options: SamplingOptions, model: SampledModel, batch_size: int
) -> jax.ShapeDtypeStruct:
    """The latents of a batch."""
    native, config = model.network.module.config.sample_size, model.codec.config
    native = native if isinstance(native, tuple) else (native or 0, native or 0)
    requested = [side and side // config.downscale for side in (options.height, options.width)]
    size = (side or own for side, own in zip(requested, native, strict=True))
    return S((batch_size, *size, config.latent_channels), jnp.float32)


def _rule(options: SamplingOptions) -> Guidance:
    """The rule with the fewest streams."""
    return parse(options.guidance).for_prompts(1).simplify([options.guidance_scale])


def _conditioning(
    model: SampledModel, x: jax.ShapeDtypeStruct, *leading: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The conditioning for latents x as shapes, with these leading axes."""
    shapes = model.network.conditioning_shapes(x.shape[1:3], model.num_tokens)
    return {name: S((*leading, *leaf.shape), leaf.dtype) for name, leaf in shapes.items()}


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


def trace_loop(
    options: SamplingOptions,
    model: SampledModel,
    params: Mapping[str, Any],
    batch_size: int,
    layout: OnMesh,
) -> Any:
    """The traced loop for `batch_size` images, with weights that say where they lie."""
    guidance, sampler = _rule(options), get_sampler(options.sampler).for_schedule(VPSchedule())
    rule = jax.tree.map(np.float32, guidance)
    grid = make_grid(VPSchedule(), options.sampler, options.steps, prediction_type=PREDICTION_TYPE)
    grid = jax.tree.map(lambda leaf: S((batch_size, *leaf.shape[1:]), leaf.dtype), grid)
    noise = _latents(options, model, batch_size)
    init = functools.partial(init_latents, sampler=sampler)
    carry = jax.eval_shape(init, noise, None, StartLevel(grid.init_noise_sigma), rule)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    guidance_scales = GuidanceScales(cast(Any, S((batch_size,), jnp.float32)))
    streams = len(guidance.streams)
    conditioning = ConditioningPair(cast(Any, _conditioning(model, noise, batch_size, streams)))
    run = functools.partial(
        denoise_steps,
        networks=Networks(layout.network(model.network)),
        image_processor=None,
        sampler=sampler,
    )

    def batch(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: batch_sharding(layout.mesh), tree)

    def whole(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: replicated(layout.mesh), tree)

    arguments = (
        Networks(params),
        place_shapes(rule, whole),
        *place_shapes((carry, conditioning, guidance_scales, grid, keys), batch),
        None,
        NO_TARGETS,
        *place_shapes((np.int32(0), np.int32(0)), whole),
    )
    return layout.jit(run, (), arguments).trace(*jax.tree.leaves(arguments))


def _flops(options: SamplingOptions, model: SampledModel, batch_size: int) -> float:
    """Of the network in one step, for all streams of `batch_size` images."""
    network, x = model.network, _latents(options, model, 1)
    arguments = x, S((1,), jnp.int32), _conditioning(model, x, 1)
    streams = len(_rule(options).streams)
    return batch_size * streams * forward_flops(network, param_dict(network.module), *arguments)
