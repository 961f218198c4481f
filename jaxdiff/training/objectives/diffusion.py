"""Denoising of latents told what the picture shows: latent diffusion (2112.10752)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int, Key
from jaxdiff.diffusion.losses import diffuse, snr, squared_errors
from jaxdiff.diffusion.losses import weights as loss_weights
from jaxdiff.diffusion.predictions import target
from jaxdiff.models.build import abstract, assemble, initial_weights, weights
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.parallel.rules import UNET
from jaxdiff.training import draws
from jaxdiff.training.config import DiffusionObjective
from jaxdiff.training.objectives import Learner, Metrics, Params
from jaxdiff.training.objectives.vae import sample_latents


class Frozen(NamedTuple):
    """What turns a batch into latents and conditions, and is not trained: weights and a caption."""

    vae: Params
    text_encoder: Params
    null: Int[Array, "n"]  # token ids of the empty caption


def draw_times(
    key: Key[Array, "..."], shape: tuple[int, ...], levels: int, how: str, shift: float = 1.0
) -> Int[Array, "..."]:
    """Noise levels 0 ... levels - 1, one draw per sample (SD3, 2403.03206, section 3.1 and eq. 23).

    `how` spreads u over [0, 1): `uniform`, or `logit_normal`, the sigmoid of a standard normal,
    the middle more often than the ends. `shift` s then moves it to s u / (1 + (s - 1) u).
    """
    u = draws.uniform(key, shape) if how == "uniform" else jax.nn.sigmoid(draws.normal(key, shape))
    moved = shift * u / (1 + (shift - 1) * u)
    return jnp.minimum((moved * levels).astype(jnp.int32), levels - 1)


def drop_captions(
    key: Key[Array, "..."], ids: Int[Array, "b n"], null: Int[Array, "n"], rate: float
) -> tuple[Int[Array, "b n"], Bool[Array, "b"]]:
    """`ids` with each caption replaced by the null caption with probability `rate`, independently.

    What classifier-free guidance needs (2207.12598, algorithm 1). Also says which were dropped.
    """
    dropped = draws.uniform(key, (len(ids),)) < rate
    return jnp.where(dropped[:, None], null[None], ids), dropped


def diffusion_learner(
    config: DiffusionObjective,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    dtype: Dtype = jnp.float32,
) -> Learner:
    """The UNet's learner, given the (abstract) modules that its `Frozen` weights belong to.

    Batches have `image` (b, h, w, 3) in [-1, 1] and `ids` (b, n) int32. Instead of pictures they
    may have `mean` and `logvar` (b, h, w, c) of their latents; the VAE's weights are then not read.
    """
    template = abstract(UNet2DConditionModel, config.model, dtype=dtype, remat=config.remat)

    def encode(
        frozen: Frozen, batch: dict[str, Array], noise_key: Array, drop_key: Array
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b n d"]]:
        """Scaled latents, and hidden states of captions; no gradient flows back."""
        if "mean" in batch:
            x0 = vae.scale(sample_latents(batch["mean"], batch["logvar"], noise_key))
        else:
            x0 = encoded(assemble(vae, frozen.vae), batch["image"], noise_key)
        ids, _ = drop_captions(drop_key, batch["ids"], frozen.null, config.caption_dropout)
        return jax.lax.stop_gradient((x0, assemble(text_encoder, frozen.text_encoder)(ids)))

    def errors(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Float[Array, "b"], Int[Array, "b"], Float[Array, ""]]:
        """The weighted error and the noise level of each picture, and the latents' deviation."""
        latent_key, drop_key, time_key, noise_key = draws.split(key, len(batch["ids"]), 4)
        x0, context = encode(frozen, batch, latent_key, drop_key)
        levels, shape = config.schedule.levels, x0.shape[:1]
        t = draw_times(time_key, shape, levels, config.times, config.time_shift)
        eps = offset_noise(noise_key, x0.shape, config.noise_offset).astype(x0.dtype)
        network = assemble(template, params)
        each = denoising_errors(config, lambda x, t: network(x, t, context), x0, t, eps)
        return each, t, jnp.std(x0)

    def loss(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        each, _, deviation = errors(params, frozen, batch, key)
        return jnp.mean(each), {"latent_std": deviation}

    def measure(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> Metrics:
        each, t, _ = errors(params, frozen, batch, key)
        return {"loss": jnp.mean(each)} | by_quartile(each, t, config.schedule.levels)

    return Learner(
        weights(template),
        functools.partial(initial_weights, template),
        loss,
        rules=UNET,
        measure=measure,
    )


def by_quartile(
    errors: Float[Array, "b"], t: Int[Array, "b"], levels: int
) -> dict[str, Float[Array, ""]]:
    """The mean error in each quarter of the noise levels, loss_q1 the cleanest; 0 where none is."""
    quarter = 4 * t // levels
    means = {}
    for i in range(4):
        inside = (quarter == i).astype(errors.dtype)
        means[f"loss_q{i + 1}"] = jnp.sum(errors * inside) / jnp.maximum(jnp.sum(inside), 1)
    return means


def offset_noise(
    key: Key[Array, "..."], shape: tuple[int, ...], amount: float
) -> Float[Array, "b h w c"]:
    """Standard normal noise plus `amount` times one draw for each channel of each picture.

    A network trained on it can change the mean of a picture (offset noise, N. Guttenberg, 2023).
    """
    if not amount:
        return draws.normal(key, shape)
    noise_key, offset_key = draws.split(key, shape[0], 2)
    offset = draws.normal(offset_key, (shape[0], 1, 1, shape[3]))
    return draws.normal(noise_key, shape) + amount * offset


def encoded(
    vae: AutoencoderKL, images: Float[Array, "b h2 w2 3"], key: Key[Array, "..."]
) -> Float[Array, "b h w c"]:
    """Scaled latents of pictures, drawn from the encoder's distribution."""
    return vae.scale(sample_latents(*vae.encode(images), key))


def denoising_errors(
    config: DiffusionObjective,
    network: Callable[[Array, Array], Array],
    x0: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    eps: Float[Array, "b h w c"],
) -> Float[Array, "b"]:
    """Each picture's weighted squared error of `network(x_t, t)` at x_t = alpha x0 + sigma eps."""
    alpha, sigma = config.schedule.gather(t)
    kind = config.prediction_type
    output = network(diffuse(x0, eps, alpha, sigma), t)
    weight = loss_weights(config.weighting, kind, snr(alpha, sigma), config.gamma)
    return squared_errors(output, target(kind, x0, eps, alpha, sigma), weight)
