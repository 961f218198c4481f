"""Sample grids of diffusion trainings: images of fixed prompts from the current weights."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Float, NDArray
from jaxdiff.diffusion.timesteps import TimestepGrid
from jaxdiff.experiments.experiment import GRID_SIZE
from jaxdiff.guidance.base import GuidanceScales
from jaxdiff.guidance.denoiser import Network, guided_denoiser, stack_streams
from jaxdiff.guidance.registry import RULES
from jaxdiff.models.conditioning import UNetConditioning
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.samplers.loop import sample as run_sampler
from jaxdiff.samplers.noise import initial_noise, per_sample_keys
from jaxdiff.samplers.registry import SAMPLERS
from jaxdiff.scenes.source import sample_prompts
from jaxdiff.training.objectives import Params

SAMPLER, SPACING = "ddim", "trailing"
# (parameters, frozen, inputs) -> weights of the network, conditioning of each stream, VAE
PrepareSampling = Callable[
    [Params, Any, Mapping[str, Array]], tuple[Any, tuple[UNetConditioning, ...], AutoencoderKL]
]


def grid_prompts() -> list[str]:
    """The prompts of grids of scenes: half with one object, half with two, none trained on."""
    half = GRID_SIZE // 2
    kinds = (sample_prompts(half, 0, kind) for kind in ("one", "two"))
    return [prompt.text for prompts in kinds for prompt in prompts]


def grid_noise(side: int, channels: int, count: int = GRID_SIZE) -> Float[NDArray, "b h w c"]:
    """The initial noise of `count` images: image i has seed i."""
    return np.asarray(initial_noise(per_sample_keys(range(count)), (side, side, channels)))


def make_sampler(
    network: Network,
    grid: TimestepGrid,
    prepare: PrepareSampling,
    *,
    rule: str,
    prediction_type: str,
    scale: float,
) -> Callable[..., Array]:
    """The function (parameters, frozen, inputs) -> images in [-1, 1].

    The inputs are `noise` and what `prepare` needs for the conditioning of each stream of `rule`,
    which is `cfg`, with the guidance scale `scale`, or `none`.
    """

    def generate(
        params: Params, frozen: Any, inputs: Mapping[str, Array]
    ) -> Float[Array, "b h2 w2 c"]:
        weights, streams, vae = prepare(params, frozen, inputs)
        noise = inputs["noise"]
        guidance_scales = GuidanceScales(jnp.full(len(noise), scale, jnp.float32))
        conditioning = stack_streams(*streams)
        denoise = guided_denoiser(
            network,
            weights,
            conditioning,
            guidance_scales,
            rule=RULES[rule],
            prediction_type=prediction_type,
        )
        keys = per_sample_keys(range(len(noise)))  # DDIM adds no noise
        z = run_sampler(denoise, noise, grid, keys, sampler=SAMPLERS[SAMPLER])
        return vae.decode(vae.unscale(z))

    return generate
