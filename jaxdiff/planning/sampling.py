"""Plans of generation: `generate.py --plan TOPOLOGY ... --model MODEL`.

Three programs run for a batch of images: the text encoders, the sampling loop and the decoder. Each
is compiled as the pipeline runs it, and what it needs beside the weights of the others decides
whether the model fits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from jaxdiff.checkpoints.schedulers import SchedulerOptions
from jaxdiff.checkpoints.timestep_grids import make_grid
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree, dtype_of
from jaxdiff.core.validate import positive
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.families.base import Family
from jaxdiff.families.text_outputs import num_tokens
from jaxdiff.guidance.base import Guidance, GuidanceScales, parse
from jaxdiff.models.build import param_dict
from jaxdiff.models.latent_codec import LatentCodec, upcast_fp16
from jaxdiff.parallel.mesh import FSDP, batch_sharding, replicated, sampling_mesh
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
from jaxdiff.pipeline.conditioning import TokenizedPrompts, encode_prompts
from jaxdiff.pipeline.defaults import model_defaults
from jaxdiff.pipeline.offload import TEXT, check_offload
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.pipeline.request import Defaults, check_options
from jaxdiff.planning.compiling import compile_traced
from jaxdiff.planning.max_batch import max_batch_size
from jaxdiff.planning.published_models import published_model
from jaxdiff.planning.report import FittingMesh, Plan, Planner, SamplingPlan
from jaxdiff.planning.topology import Topology, topology_devices
from jaxdiff.profiling.flops import forward_flops
from jaxdiff.samplers.base import get_sampler

S = jax.ShapeDtypeStruct
MESH_TRIES = 2  # meshes that are compiled to find one on which a model fits
# Options that are those of a call.
CALL = ("steps", "sampler", "guidance", "guidance_scale", "height", "width")
TEXT_ENCODERS, LOOP, DECODER = "text_encoders", "loop", "decoder"  # the programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Compile what generates images for absent TPUs or GPUs; report memory and time.

    These are the text encoders, the sampling loop and the decoder. Without a mesh every chip runs
    the same programs on its own images, so nothing is sent.
    """

    plan: tuple[str, ...]
    """Topologies, such as v5e:2x4 or h200:8."""
    model: str
    """A diffusers folder or a checkpoint file, whose weights are not read, or the name of a
    published repository, of which nothing is."""
    base: str | None = None
    """A diffusers folder with what a checkpoint file lacks: text encoders, tokenizers, VAE,
    schedule."""
    vae: str | None = None
    """A VAE instead of the model's own: a folder or a file."""
    batch_size: int = 8
    """Images per batch, over all devices together."""
    steps: int | None = None
    """Number of denoising steps. Default: the model's."""
    sampler: str | None = None
    """Sampler; `jaxdiff generate --help` lists them, and the guidance rules. Default: the
    model's."""
    guidance: str | None = None
    """Guidance rule. Default: the model's."""
    guidance_scale: float | None = None
    """Guidance scale; 1 runs one stream. Default: the model's."""
    height: int | None = None
    """Height in pixels. Default: the size that the model was trained at."""
    width: int | None = None
    """Width in pixels."""
    mesh: str | None = None
    """Share weights and work between devices, such as fsdp=4,tensor=2 or guidance=2."""
    offload: str | None = None
    """What leaves the devices while it is not needed: text, the text encoders."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    find_max_batch: bool = True
    """Also find the largest batch that fits."""
    json: bool = False
    """Print one JSON object."""


class SampledModel(NamedTuple):
    """What the programs run, and what their shapes depend on."""

    family: Family
    network: Any  # the adapter
    codec: LatentCodec
    text_encoders: Mapping[str, Any]  # by component
    components: Mapping[str, nnx.Module]  # all that have weights on the devices
    schedule: Schedule
    scheduler_options: SchedulerOptions
    prediction_type: str
    defaults: Defaults
    num_tokens: int  # of a prompt within one window of the text encoders

    def with_defaults(self, options: SamplingOptions) -> SamplingOptions:
        """`options` with the model's defaults where they have none; raises InputError."""
        own = {
            name: getattr(self.defaults, name) for name in CALL if getattr(options, name) is None
        }
        complete = dataclasses.replace(options, **own)
        if complete.sampler is None:
            raise InputError("sampler: got none, expected one, as the model has no default")
        positive("steps", cast(int, complete.steps))
        positive("batch_size", complete.batch_size)
        return complete


class Program(NamedTuple):
    """One of the programs, for any number of images."""

    weights: PyTree  # as shapes that say where they lie
    trace: Callable[[int], Any]  # images -> the traced program, whose first arguments are `weights`
    flops: Callable[[int], float]  # images -> model FLOPs
    runs: int = 1  # how often its body runs for a batch


def sampled_model(options: SamplingOptions) -> SampledModel:
    """The model of `options` as shapes; raises InputError."""
    dtype = dtype_of(options.dtype)
    family, parts = published_model(options.model, dtype, base=options.base, vae=options.vae)
    modules: dict[str, Any] = {name: each.module for name, each in parts.components.items()}
    prediction_type = family.prediction_type(parts.scheduler)
    texts = {spec.component: modules[spec.component] for spec in family.text_encoders}
    codec = {} if family.latent_codec is None else {family.latent_codec: family.codec(modules)}
    return SampledModel(
        family=family,
        network=family.adapter(modules[family.network], prediction_type),
        codec=family.codec(modules),
        text_encoders=texts,
        components=cast(Any, {family.network: modules[family.network], **codec, **texts}),
        schedule=family.schedule(parts.scheduler),
        scheduler_options=SchedulerOptions.from_config(parts.scheduler, parts.class_name),
        prediction_type=prediction_type,
        defaults=model_defaults(parts, family, options.model),
        num_tokens=num_tokens(family, modules),
    )


def sampling_planner(options: SamplingOptions) -> Planner:
    """The planner of generation with `options`; raises InputError."""
    check_options({name: getattr(options, name) for name in CALL})
    model = sampled_model(options)
    options = model.with_defaults(options)
    check_offload(options.offload)
    _grid(options, model)  # raises InputError

    def plan(topology: Topology) -> SamplingPlan:
        devices = topology_devices(topology)
        # Without a mesh, one chip tells all: it has all weights, and shares nothing.
        shared = devices if options.mesh else devices[:1]
        on_mesh = _PlannedMesh(options, model, topology, sampling_mesh(options.mesh or {}, shared))
        each = -(-options.batch_size // on_mesh.batch_multiple)
        programs = on_mesh.compiled(each)
        total, max_batch, mesh = max(p.total for p in programs.values()), None, None
        if options.find_max_batch:
            measured = {each: total}
            fitting = max_batch_size(on_mesh.total, measured, topology.chip.hbm, 1)
            max_batch = on_mesh.batch_multiple * fitting
        if total > topology.chip.hbm:
            mesh = _fitting_mesh(on_mesh, devices, each, total)
        return SamplingPlan(
            topology=topology,
            batch_size=each * on_mesh.batch_multiple,
            programs=programs,
            weights=on_mesh.weights,
            offload=options.offload,
            max_batch_size=max_batch,
            fitting_mesh=mesh,
        )

    return plan


class _PlannedMesh:
    """The programs of a model on one mesh of a topology."""

    def __init__(
        self, options: SamplingOptions, model: SampledModel, topology: Topology, mesh: Mesh
    ) -> None:
        self.options, self.model, self.topology, self.mesh = options, model, topology, mesh
        self._layout = OnMesh(mesh)
        # images that all chips generate where each shard of a batch has one
        self.batch_multiple = self._layout.num_shards * (topology.num_chips // mesh.size)
        self._programs = sampling_programs(options, model, self._layout)
        self.weights = {
            name: shard_bytes(_placed_weights(param_dict(module), mesh))
            for name, module in model.components.items()
        }

    def compiled(self, each: int) -> dict[str, Plan]:
        """The programs for `each` images of every shard of a batch, by name."""
        return {name: self._compiled(name, each) for name in self._programs}

    def total(self, each: int) -> float:
        """The most bytes that a chip needs for `each` images of every shard of a batch."""
        return max(plan.total for plan in self.compiled(each).values())

    def resident(self, program: str) -> float:
        """Bytes of all weights that a chip holds while a program runs."""
        absent = self.options.offload == TEXT and program != TEXT_ENCODERS
        texts = self.model.text_encoders if absent else ()
        return sum(size for name, size in self.weights.items() if name not in texts)

    def _compiled(self, name: str, each: int) -> Plan:
        program = self._programs[name]
        with jax.default_matmul_precision(
            "highest" if dtype_of(self.options.dtype) == jnp.float32 else None
        ):
            traced = program.trace(each * self._layout.num_shards)
            compiled = compile_traced(traced, self.topology)
        if name == LOOP:  # that over the steps, of which the plan is of one
            compiled = compiled._replace(unknown_loops=compiled.unknown_loops - 1)
        images = each * self.batch_multiple
        own = used_bytes(traced, program.weights)
        return Plan(
            topology=self.topology,
            batch_size=images,
            compiled=compiled,
            model_flops=program.flops(images) / self.topology.num_chips,
            state_bytes={"weights": shard_bytes(program.weights)},
            resident_bytes=self.resident(name) - own,
            steps=program.runs,
        )


def _fitting_mesh(
    planned: _PlannedMesh, devices: Sequence[Any], each: int, total: float
) -> FittingMesh:
    """The smallest axis "fsdp" on which the programs fit, compiled; its size is None for none.

    Sizes are passed over where the weights alone leave less room than the others took before.
    """
    options, model, topology = planned.options, planned.model, planned.topology
    chips, others = topology.num_chips, total - sum(planned.weights.values())
    before, least, tried = planned.mesh.shape[FSDP], total, 0
    for size in range(before + 1, chips + 1):
        if chips % size or tried == MESH_TRIES:
            continue
        found = _PlannedMesh(options, model, topology, sampling_mesh({FSDP: size}, devices))
        if sum(found.weights.values()) + max(others, 0) > topology.chip.hbm and size < chips:
            continue
        tried, least = tried + 1, found.total(each)
        if least <= topology.chip.hbm:
            return FittingMesh(size, least)
    return FittingMesh(None, least)


def sampling_programs(
    options: SamplingOptions, model: SampledModel, layout: OnMesh
) -> dict[str, Program]:
    """The programs of a model by name, in the order in which they run."""
    encoders = tuple(layout.split(each)[1] for each in model.text_encoders.values())
    texts = _placed_weights(encoders, layout.mesh)
    network = _placed_weights(param_dict(model.network.module), layout.mesh)
    codec = _placed_weights(layout.split(_decoder(model))[1], layout.mesh)
    programs = {
        TEXT_ENCODERS: Program(
            texts,
            lambda n: trace_text_encoders(options, model, texts, n, layout),
            lambda n: n * _text_flops(options, model),
        ),
        LOOP: Program(
            network,
            lambda n: trace_loop(options, model, network, n, layout),
            lambda n: n * _flops(options, model),
            cast(int, options.steps),
        ),
        DECODER: Program(
            codec,
            lambda n: trace_decoder(options, model, codec, n, layout),
            lambda n: n * _decoder_flops(options, model),
        ),
    }
    return programs if model.text_encoders else {n: programs[n] for n in (LOOP, DECODER)}


def _placed_weights(weights: PyTree, mesh: Mesh) -> Any:
    return place_shapes(weights, lambda tree: infer_shardings(tree, mesh))


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


def _decoder(model: SampledModel) -> Any:
    """The codec as the pipeline computes with it."""
    return upcast_fp16(cast(Any, model.codec))


def _latents(
    options: SamplingOptions, model: SampledModel, batch_size: int
) -> jax.ShapeDtypeStruct:
    """The latents of a batch."""
    height, width = _size(options, model)
    downscale, channels = model.codec.config.downscale, model.codec.config.latent_channels
    return S((batch_size, height // downscale, width // downscale, channels), jnp.float32)


def _size(options: SamplingOptions, model: SampledModel) -> tuple[int, int]:
    complete = model.with_defaults(options)
    return cast(int, complete.height), cast(int, complete.width)


def _rule(options: SamplingOptions, model: SampledModel) -> Guidance:
    """The rule with the fewest streams."""
    complete = model.with_defaults(options)
    rule = parse(cast(str, complete.guidance)).for_prompts(1)
    return rule.simplify([cast(float, complete.guidance_scale)])


def _grid(options: SamplingOptions, model: SampledModel) -> TimestepGrid:
    """The timestep grid of one image."""
    complete, (height, width) = model.with_defaults(options), _size(options, model)
    return make_grid(
        model.schedule,
        cast(str, complete.sampler),
        cast(int, complete.steps),
        prediction_type=model.prediction_type,
        spacing=model.defaults.timestep_spacing,
        options=model.scheduler_options,
        num_tokens=height * width // (2 * model.codec.config.downscale) ** 2,
    )


def _prompts(options: SamplingOptions, model: SampledModel, batch_size: int) -> TokenizedPrompts:
    """The prompts of a batch as shapes, each within one window of the text encoders."""
    streams = len(_rule(options, model).streams)
    lengths = [
        spec.num_tokens(model.text_encoders[spec.component]) for spec in model.family.text_encoders
    ]
    return TokenizedPrompts(
        ids=cast(Any, tuple(S((batch_size, streams, 1, n), jnp.int32) for n in lengths)),
        weights=cast(Any, tuple(S((batch_size, streams, 1, n), jnp.float32) for n in lengths)),
        zero_out=cast(Any, S((batch_size, streams), jnp.bool_)),
    )


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
    guidance, name = _rule(options, model), model.with_defaults(options).sampler
    sampler = get_sampler(cast(str, name)).for_schedule(model.schedule)
    rule = jax.tree.map(np.float32, guidance)
    grid = _grid(options, model)
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
    prompts = place_shapes(_prompts(options, model, batch_size), _shardings(layout)[0])
    return layout.jit(run, (), (params, prompts)).trace(*jax.tree.leaves((params, prompts)))


def trace_decoder(
    options: SamplingOptions, model: SampledModel, params: PyTree, batch_size: int, layout: OnMesh
) -> Any:
    """The traced decoder for the latents of `batch_size` images, without tiles."""
    run = functools.partial(decode_images, codec=layout.split(_decoder(model))[0])
    latents = place_shapes(_latents(options, model, batch_size), _shardings(layout)[0])
    return layout.jit(run, (), (params, latents)).trace(*jax.tree.leaves((params, latents)))


def _text_flops(options: SamplingOptions, model: SampledModel) -> float:
    """Of the text encoders, for all streams of one image."""
    graphs, params = zip(*(nnx.split(each) for each in model.text_encoders.values()), strict=True)
    encoders = tuple(functools.partial(nnx.merge, graph) for graph in graphs)
    run = functools.partial(encode_prompts, encoders=encoders, family=model.family, skip=0)
    return forward_flops(run, params, _prompts(options, model, 1))


def _flops(options: SamplingOptions, model: SampledModel) -> float:
    """Of the network in one step, for all streams of one image."""
    network, x = model.network, _latents(options, model, 1)
    arguments = x, S((1,), jnp.int32), _conditioning(model, x, 1)
    streams = len(_rule(options, model).streams)
    return streams * forward_flops(network, param_dict(network.module), *arguments)


def _decoder_flops(options: SamplingOptions, model: SampledModel) -> float:
    """Of the decoder, for one image."""
    graph, params = nnx.split(_decoder(model))
    run = functools.partial(decode_images, codec=functools.partial(nnx.merge, graph))
    return forward_flops(run, params, _latents(options, model, 1))
