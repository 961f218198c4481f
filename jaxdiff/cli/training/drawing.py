"""What diffusion trainings show: pictures of fixed prompts, drawn by the network as it is."""

from collections.abc import Callable
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxdiff.cli.training.experiment import SHOWN
from jaxdiff.core.types import Array, Float, Int, NDArray
from jaxdiff.data.scenes import sample_prompts
from jaxdiff.diffusion.timesteps import Grid
from jaxdiff.guidance.denoiser import Network, guided, stack_streams
from jaxdiff.guidance.registry import RULES
from jaxdiff.guidance.rule import Dials
from jaxdiff.models.build import assemble
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet_config import UNet2DConditionConfig
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.samplers.loop import sample as run_sampler
from jaxdiff.samplers.noise import image_keys, initial_noise
from jaxdiff.samplers.registry import SAMPLERS
from jaxdiff.training.objectives import Params
from jaxdiff.training.objectives.diffusion import Frozen as Diffusion
from jaxdiff.training.objectives.distillation import Frozen as Distillation

SAMPLER, SPACING = "ddim", "trailing"


def shown_prompts() -> list[str]:
    """The fixed prompts of the grids: half with one thing, half with two, none trained on."""
    half = SHOWN // 2
    kinds = (sample_prompts(half, 0, kind) for kind in ("one", "two"))
    return [prompt.text for prompts in kinds for prompt in prompts]


def shown_noise(model: UNet2DConditionConfig) -> Float[NDArray, "b h w c"]:
    """What the pictures of the grids start from: image i has seed i."""
    side, channels = cast(int, model.sample_size), model.in_channels
    return np.asarray(initial_noise(image_keys(range(SHOWN)), (side, side, channels)))


def make_sampler(
    network: Network,
    grid: Grid,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    *,
    rule: str,
    kind: str,
    scale: float,
) -> Callable[[Params, Diffusion | Distillation, Array, Array], Array]:
    """The function (network's weights, frozen, ids, noise) -> pictures in [-1, 1].

    The network predicts `kind`; `rule` is `cfg`, guided by `scale`, or `none`.
    """

    def draw(
        params: Params,
        frozen: Diffusion | Distillation,
        ids: Int[Array, "b n"],
        noise: Float[Array, "b h w z"],
    ) -> Float[Array, "b h2 w2 c"]:
        encode, decoder = assemble(text, frozen.text_encoder), assemble(vae, frozen.vae)
        states = encode(ids)
        null = jnp.broadcast_to(encode(frozen.null[None]), states.shape)
        streams = {"cfg": (null, states), "none": (states,)}[rule]
        dials = Dials(jnp.full(len(ids), scale, jnp.float32))
        told = stack_streams(*streams)
        denoise = guided(network, params, told, dials, rule=RULES[rule], kind=kind)
        keys = image_keys(range(len(ids)))  # DDIM draws nothing
        z = run_sampler(denoise, noise, grid, keys, sampler=SAMPLERS[SAMPLER])
        return decoder.decode(decoder.unscale(z))

    return draw
