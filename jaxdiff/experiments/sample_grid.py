"""Sample grids of diffusion trainings: images of fixed prompts from the current weights."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from jaxdiff.checkpoints.timestep_grids import make_grid
from jaxdiff.core.types import Array, Float, NDArray
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.experiments.base_model import SAMPLER, SPACING, BaseModel
from jaxdiff.families.extras import GUIDANCE_SCALE, LOW_RESOLUTION_LEVEL
from jaxdiff.families.low_resolution import LowResolutionImage
from jaxdiff.guidance.base import GuidanceScales, parse
from jaxdiff.guidance.denoiser import stack_streams
from jaxdiff.models.image_processor import CLIPImageProcessor
from jaxdiff.pipeline.compiled_model import (
    NO_TARGETS,
    ConditioningPair,
    Networks,
    StartLevel,
    denoise_steps,
    init_latents,
)
from jaxdiff.samplers.base import SAMPLERS, per_sample_keys
from jaxdiff.samplers.sampling import initial_noise
from jaxdiff.training.objectives.diffusion import Frozen, LatentDiffusion
from jaxdiff.training.objectives.guided_conditioning import uncond_and_cond
from jaxdiff.training.objectives.image_columns import embedding_columns, low_resolution_columns
from jaxdiff.training.step import Params


def sampling_inputs(
    base: BaseModel,
    side: int,
    count: int,
    images: Callable[[], Float[NDArray, "b h w 3"]] | None = None,
) -> dict[str, NDArray]:
    """Initial noise, of seed i for image i, and size conditioning of `count` images.

    A network that enlarges images gets `images`, smaller and with noise of the model's level; one
    with embeddings of images gets `images` as they are.
    """
    shape = base.codec.latent_shape(side, side)
    noise = np.asarray(initial_noise(per_sample_keys(range(count)), shape))
    sizes = np.tile(np.array([[side, side, 0, 0, side, side]], np.float32), (count, 1))
    inputs = {"noise": noise, "time_ids": sizes}
    if images is not None and base.image_encoder is not None:
        inputs["image"] = images()
    if images is None or not base.family.enlarges:
        return inputs
    return inputs | _low_resolution(base, images(), shape[:-1])


def _low_resolution(
    base: BaseModel, images: Float[NDArray, "b h w 3"], latent_size: tuple[int, ...]
) -> dict[str, NDArray]:
    factor = base.codec.config.downscale
    factor = base.objective.enlargement if factor == 1 else factor
    keys = per_sample_keys(range(len(images)))
    columns = low_resolution_columns(jnp.asarray(images), factor, latent_size, keys)
    for extra in base.family.extras:
        if isinstance(extra, LowResolutionImage):
            level = extra.noise_level / (extra.highest + 1)
            columns[LOW_RESOLUTION_LEVEL] = jnp.full(len(images), level, jnp.float32)
    return {name: np.asarray(column) for name, column in columns.items()}


def make_sampler(
    model: LatentDiffusion,
    schedule: Schedule,
    *,
    steps: int,
    guidance_scale: float,
    clipping: str | None = None,
    image_processor: CLIPImageProcessor | None = None,
) -> Callable[..., Array]:
    """The function (parameters, frozen, inputs) -> images in [-1, 1], or embeddings of a prior.

    The inputs are `sampling_inputs` and token ids of prompts. `clipping` is the guidance wrapper
    that clips the image of each step, if one does, and `image_processor` is that of a network with
    embeddings of images.
    """
    network, sampler = model.network, SAMPLERS[SAMPLER]
    rule = model.family.request_defaults.get("guidance", "cfg")
    guidance = parse(rule if clipping is None else f"{rule}+{clipping}")
    grid = make_grid(
        schedule, SAMPLER, steps, prediction_type=network.prediction_type, spacing=SPACING
    )

    def generate(
        params: Params, frozen: Frozen, inputs: Mapping[str, Array]
    ) -> Float[Array, "b *space c"]:
        tables, noise = model.merge_weights(params, frozen), inputs["noise"]
        encoders, b = model.build_encoders(tables), len(noise)
        scale = jnp.full(b, guidance_scale, jnp.float32)
        batch = {**inputs, GUIDANCE_SCALE: scale}
        if image_processor is not None and model.family.embeddings is None:
            encoder = encoders[str(model.family.image_encoder)]
            batch |= embedding_columns(encoder, image_processor, inputs["image"])
        uncond, cond = uncond_and_cond(model, encoders, frozen.null, batch)
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
        codec = model.codec(tables)
        return codec.decode(codec.unscale(state.x))

    return generate
