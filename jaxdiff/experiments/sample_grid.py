"""Sample grids of diffusion trainings: images of fixed prompts from the current weights."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.timestep_grids import make_grid
from jaxdiff.core.types import Array, Float, NDArray
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.experiments.base_model import SAMPLER, SPACING, BaseModel
from jaxdiff.families.extras import GUIDANCE_SCALE
from jaxdiff.guidance.base import RULES, GuidanceScales
from jaxdiff.guidance.denoiser import stack_streams
from jaxdiff.pipeline.compiled_model import (
    NO_TARGETS,
    ConditioningPair,
    Networks,
    StartLevel,
    denoise_steps,
    init_latents,
)
from jaxdiff.samplers.base import SAMPLERS, initial_noise, per_sample_keys
from jaxdiff.training.objectives.diffusion import Frozen, LatentDiffusion
from jaxdiff.training.step import Params


def sampling_inputs(base: BaseModel, side: int, count: int) -> dict[str, NDArray]:
    """Initial noise, of seed i for image i, and size conditioning of `count` images."""
    codec = base.codec.config
    shape = side // codec.downscale, side // codec.downscale, codec.latent_channels
    noise = np.asarray(initial_noise(per_sample_keys(range(count)), shape))
    sizes = np.tile(np.array([[side, side, 0, 0, side, side]], np.float32), (count, 1))
    return {"noise": noise, "time_ids": sizes}


def make_sampler(
    model: LatentDiffusion, schedule: Schedule, *, steps: int, guidance_scale: float
) -> Callable[..., Array]:
    """The function (parameters, frozen, inputs) -> images in [-1, 1].

    The inputs are `sampling_inputs` and token ids of prompts.
    """
    network, sampler = model.network, SAMPLERS[SAMPLER]
    guidance = RULES[model.family.request_defaults.get("guidance", "cfg")]
    grid = make_grid(
        schedule, SAMPLER, steps, prediction_type=network.prediction_type, spacing=SPACING
    )

    def generate(
        params: Params, frozen: Frozen, inputs: Mapping[str, Array]
    ) -> Float[Array, "b h2 w2 c"]:
        tables, noise = model.merge_weights(params, frozen), inputs["noise"]
        encoders, b = model.build_encoders(tables), len(noise)
        scale = jnp.full(b, guidance_scale, jnp.float32)
        batch = {**inputs, GUIDANCE_SCALE: scale}
        uncond, cond = model.uncond_and_cond(encoders, frozen.null, batch)
        streams = [cond if s.prompt_source == "prompt" else uncond for s in guidance.streams]
        conditioning = stack_streams(*streams)
        first = jnp.int32(0)
        state = denoise_steps(
            Networks(tables[model.family.network]),
            guidance,
            init_latents(noise, None, StartLevel(grid.init_noise_sigma), guidance, sampler=sampler),
            ConditioningPair(conditioning),
            GuidanceScales(scale),
            grid,
            per_sample_keys(range(b)),  # DDIM adds no noise
            None,
            NO_TARGETS,
            first,
            grid.num_steps[0],
            networks=Networks(network),
            image_processor=None,
            sampler=sampler,
        )
        codec = model.family.codec(encoders)
        return codec.decode(codec.unscale(state.x))

    return generate
