"""Plans of the sampling loop: `generate.py --plan TOPOLOGY ... --model MODEL`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxdiff.checkpoints.timestep_grids import make_grid
from jaxdiff.core.types import PyTree, dtype_of
from jaxdiff.core.validate import positive
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.guidance.base import Guidance, GuidanceScales, parse
from jaxdiff.models.build import param_dict
from jaxdiff.pipeline.compiled_model import (
    NO_TARGETS,
    ConditioningPair,
    Networks,
    StartLevel,
    denoise_steps,
    init_latents,
)
from jaxdiff.planning.compiling import CompiledProgram, compile_traced
from jaxdiff.planning.max_batch import max_batch_size
from jaxdiff.planning.published_models import published_model
from jaxdiff.planning.report import Plan, Planner
from jaxdiff.planning.topology import Topology, topology_devices
from jaxdiff.profiling.flops import forward_flops
from jaxdiff.samplers.base import get_sampler

PREDICTION_TYPE = "epsilon"  # costs as much as any other
NUM_TOKENS = 77  # of a prompt within one window of the text encoder
VAE_SCALE_FACTOR = 8  # pixels along a latent
S = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Compile the sampling loop for absent TPUs or GPUs; report memory and time.

    The text encoder and the VAE, which run once for each image, are not in it. Every chip runs
    the same program on its own images, so nothing is sent.
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
    """Sampler."""
    guidance: str = "cfg"
    """Guidance rule."""
    guidance_scale: float = 7.5
    """Guidance scale; 1 runs one stream."""
    height: int | None = None
    """Height in pixels. Default: the size that the model was trained at."""
    width: int | None = None
    """Width in pixels."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    find_max_batch: bool = True
    """Also find the largest batch that fits."""
    json: bool = False
    """Print one JSON object."""


def sampling_planner(options: SamplingOptions) -> Planner:
    """The planner of the sampling loop with `options`; raises InputError."""
    dtype = dtype_of(options.dtype)
    family, modules = published_model(options.model, dtype=dtype, param_dtype=dtype)
    network = family.adapter(modules[family.network], PREDICTION_TYPE)
    positive("steps", options.steps)
    positive("batch_size", options.batch_size)

    def plan(topology: Topology) -> Plan:
        device = topology_devices(topology)[0]

        def compiled(each: int) -> CompiledProgram:
            return compile_traced(_traced(options, network, each, device), topology)

        each = -(-options.batch_size // topology.num_chips)
        first, max_batch = compiled(each), None
        if options.find_max_batch:
            measured = {each: first.total}
            per_chip = max_batch_size(lambda n: compiled(n).total, measured, topology.chip.hbm, 1)
            max_batch = topology.num_chips * per_chip
        params = param_dict(network.module)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in params.values())
        return Plan(
            topology=topology,
            batch_size=each * topology.num_chips,
            compiled=first._replace(
                unknown_loops=first.unknown_loops - 1
            ),  # that over the steps: one of them
            model_flops=_flops(options, network, each),
            state_bytes={"weights": float(size)},
            steps=options.steps,
            max_batch_size=max_batch,
        )

    return plan


def _latent_size(options: SamplingOptions, network: Any) -> tuple[int, int]:
    """Height and width of the latents."""
    native = network.module.config.sample_size
    native = native if isinstance(native, tuple) else (native or 0, native or 0)
    requested = [
        pixels and pixels // VAE_SCALE_FACTOR for pixels in (options.height, options.width)
    ]
    height, width = (side or own for side, own in zip(requested, native, strict=True))
    return height, width


def _rule(options: SamplingOptions) -> Guidance:
    """The rule with the fewest streams."""
    return parse(options.guidance).for_prompts(1).simplify([options.guidance_scale])


def _conditioning(
    network: Any, size: tuple[int, int], *leading: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The conditioning as shapes, with these leading axes."""
    shapes = network.conditioning_shapes(size, NUM_TOKENS)
    return {name: S((*leading, *leaf.shape), leaf.dtype) for name, leaf in shapes.items()}


def _traced(options: SamplingOptions, network: Any, batch_size: int, device: Any) -> Any:
    """The traced loop for `batch_size` images on a chip."""
    guidance, sampler = _rule(options), get_sampler(options.sampler).for_schedule(VPSchedule())
    rule = jax.tree.map(np.float32, guidance)
    grid = make_grid(VPSchedule(), options.sampler, options.steps, prediction_type=PREDICTION_TYPE)
    grid = jax.tree.map(np.asarray, grid)  # not on a device of this machine
    size = _latent_size(options, network)
    noise = S((batch_size, *size, network.module.config.out_channels), jnp.float32)
    zero = np.int32(0)
    init = functools.partial(init_latents, sampler=sampler)
    carry = jax.eval_shape(init, noise, None, StartLevel(grid.init_noise_sigma), rule)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    guidance_scales = GuidanceScales(cast(Any, S((batch_size,), jnp.float32)))
    streams = len(guidance.streams)
    conditioning = ConditioningPair(cast(Any, _conditioning(network, size, batch_size, streams)))
    run = functools.partial(
        denoise_steps,
        networks=Networks(network),
        image_processor=None,
        sampler=sampler,
    )
    sharding = SingleDeviceSharding(device)
    loop = jax.jit(run, in_shardings=sharding, out_shardings=sharding)
    arguments: Sequence[PyTree] = (
        Networks(param_dict(network.module)),
        rule,
        carry,
        conditioning,
        guidance_scales,
        grid,
        keys,
    )
    return loop.trace(*arguments, None, NO_TARGETS, zero, zero)


def _flops(options: SamplingOptions, network: Any, batch_size: int) -> float:
    """Of the network in one step, for all streams of `batch_size` images."""
    size = _latent_size(options, network)
    x = S((1, *size, network.module.config.out_channels), jnp.float32)
    arguments = x, S((1,), jnp.int32), _conditioning(network, size, 1)
    streams = len(_rule(options).streams)
    return batch_size * streams * forward_flops(network, param_dict(network.module), *arguments)
