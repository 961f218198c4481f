"""`generate.py --plan TOPOLOGY ... --model MODEL`: what the sampling loop would take."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import PyTree, dtype_of
from jaxdiff.core.validate import positive
from jaxdiff.diffusion.schedules import NoiseSchedule
from jaxdiff.guidance.base import GuidanceScales
from jaxdiff.guidance.registry import parse
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.pipeline.compiled_model import (
    NO_TARGETS,
    ConditioningPair,
    Networks,
    denoise_steps,
    init_latents,
)
from jaxdiff.pipeline.conditioning import Conditioning
from jaxdiff.planning.abstract_training import component
from jaxdiff.planning.compiling import Compiled, compile_traced
from jaxdiff.planning.max_batch import largest_batch
from jaxdiff.planning.report import Plan, Planner
from jaxdiff.planning.topology import Topology, devices
from jaxdiff.samplers.registry import get_sampler, make_grid
from jaxdiff.training.flops import forward_flops

TOKENS = 77  # of a prompt that is not longer than one window of the text encoder
CELL = 8  # pixels along a latent
S = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Compile the sampling loop for chips that are not here, and say what it takes.

    The text encoder and the VAE, which run once for each picture, are not in it. Every chip runs
    the same program on its own pictures, so nothing is sent.
    """

    plan: tuple[str, ...]
    """Topologies, such as v5e:2x4 or h200:8."""
    model: str
    """A diffusers folder, whose weights are not read, or a published repository."""
    batch_size: int = 8
    """Pictures drawn at once, over all chips together."""
    steps: int = 50
    """Denoising steps."""
    sampler: str = "dpmpp-2m"
    """The rule of one step."""
    guidance: str = "cfg"
    """The rule of guidance."""
    guidance_scale: float = 7.5
    """Its strength; 1 runs one stream."""
    height: int | None = None
    """Height in pixels; left out: what the model was trained on."""
    width: int | None = None
    """Width in pixels."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    largest: bool = True
    """Look for the largest batch too."""
    json: bool = False
    """Print one JSON object."""


def sampling_planner(options: SamplingOptions) -> Planner:
    """Plans the sampling loop that `options` ask for; raises InputError."""
    dtype = dtype_of(options.dtype)
    found = component(f"{options.model}/unet", dtype=dtype, param_dtype=dtype)
    unet = cast(UNet2DConditionModel, found)
    positive("steps", options.steps)
    positive("batch_size", options.batch_size)

    def plan(topology: Topology) -> Plan:
        one = devices(topology)[0]

        def compiled(each: int) -> Compiled:
            return compile_traced(_traced(options, unet, each, one), topology)

        each = -(-options.batch_size // topology.chips)
        first, fits = compiled(each), None
        if options.largest:
            known = {each: first.total}
            most = largest_batch(lambda n: compiled(n).total, known, topology.chip.hbm, 1)
            fits = topology.chips * most
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in param_dict(unet).values())
        return Plan(
            topology=topology,
            batch_size=each * topology.chips,
            compiled=first._replace(loops=first.loops - 1),  # that over the steps: one of them
            model_flops=_flops(options, unet, each),
            held={"weights": float(size)},
            steps=options.steps,
            largest=fits,
        )

    return plan


def _sides(options: SamplingOptions, unet: UNet2DConditionModel) -> tuple[int, int]:
    """Height and width of the latents."""
    native = unet.config.sample_size
    native = native if isinstance(native, tuple) else (native or 0, native or 0)
    asked = [pixels and pixels // CELL for pixels in (options.height, options.width)]
    height, width = (side or own for side, own in zip(asked, native, strict=True))
    return height, width


def _told(unet: UNet2DConditionModel, each: int, streams: int) -> Conditioning:
    """What the network is told of `each` pictures, as shapes."""
    config, dtype = unet.config, unet.dtype
    if config.time_cond_proj_dim is not None or not config.has_context:
        raise InputError("plan: got a network without prompts or with guidance, expected another")
    context = S((each, streams, TOKENS, config.per_block("cross_attention_dim")[0]), dtype)
    if config.addition_embed_type is None:
        return Conditioning(cast(Any, context))
    width, numbers = config.projection_class_embeddings_input_dim or 0, 6
    pooled = width - numbers * (config.addition_time_embed_dim or 0)
    return Conditioning(
        cast(Any, context),
        text_embeds=cast(Any, S((each, streams, pooled), dtype)),
        time_ids=cast(Any, S((each, streams, numbers), jnp.float32)),
    )


def _traced(options: SamplingOptions, unet: UNet2DConditionModel, each: int, device: Any) -> Any:
    """The loop over `each` pictures of a chip."""
    guidance = parse(options.guidance).for_prompts(1).simplify([options.guidance_scale])
    rule = jax.tree.map(np.float32, guidance)
    sampler, kind = get_sampler(options.sampler, None), "epsilon"
    grid = make_grid(NoiseSchedule(), options.sampler, options.steps, prediction_type=kind)
    grid = jax.tree.map(np.asarray, grid)  # not on a device of this machine
    height, width = _sides(options, unet)
    noise = S((each, height, width, unet.config.out_channels), jnp.float32)
    graph, params = nnx.split(unet)
    first = np.int32(0)
    begin = functools.partial(init_latents, sampler=sampler, start="noise")
    carry = jax.eval_shape(begin, noise, None, grid, first, rule)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), each))
    dials = GuidanceScales(cast(Any, S((each,), jnp.float32)))
    told = ConditioningPair(_told(unet, each, len(guidance.streams)))
    run = functools.partial(
        denoise_steps,
        graphs=Networks(graph),
        prediction_types=(kind, kind),
        image_processor=None,
        sampler=sampler,
    )
    here = SingleDeviceSharding(device)
    loop = jax.jit(run, in_shardings=here, out_shardings=here)
    arguments: Sequence[PyTree] = (Networks(params), rule, carry, told, dials, grid, keys)
    return loop.trace(*arguments, None, NO_TARGETS, first, first)


def _flops(options: SamplingOptions, unet: UNet2DConditionModel, each: int) -> float:
    """Of the network in one step, for all streams of `each` pictures."""
    guidance = parse(options.guidance).for_prompts(1).simplify([options.guidance_scale])
    streams = len(guidance.streams)
    height, width = _sides(options, unet)
    told = _told(unet, 1, 1)
    more = {
        name: S((1, *value.shape[2:]), value.dtype)
        for name, value in (("text_embeds", told.text_embeds), ("time_ids", told.time_ids))
        if value is not None
    }
    context = S((1, *told.context.shape[2:]), told.context.dtype)

    def network(params: PyTree, x: Any, t: Any, context: Any, more: Any) -> Any:
        return with_params(unet, params)(x, t, context, **more)

    x = S((1, height, width, unet.config.in_channels), jnp.float32)
    t = S((1,), jnp.int32)
    return each * streams * forward_flops(network, param_dict(unet), x, t, context, more)
