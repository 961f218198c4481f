"""Denoising of latents told what the picture shows: latent diffusion (2112.10752)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Dtype, Float, Int, Key
from jaxdiff.diffusion.losses import diffuse, mse, snr
from jaxdiff.diffusion.losses import weights as loss_weights
from jaxdiff.diffusion.predictions import target
from jaxdiff.models.build import abstract, assemble, initial_weights, weights
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.parallel.rules import UNET
from jaxdiff.training.config import DiffusionObjective
from jaxdiff.training.objectives import Learner, Metrics, Params
from jaxdiff.training.objectives.vae import sample_latents


class Frozen(NamedTuple):
    """What turns a batch into latents and conditions, and is not trained: weights and a caption."""

    vae: Params
    text_encoder: Params
    null: Int[Array, "n"]  # token ids of the empty caption


def draw_times(
    key: Key[Array, ""], shape: tuple[int, ...], levels: int, how: str, shift: float = 1.0
) -> Int[Array, "..."]:
    """Noise levels 0 ... levels - 1, one draw per sample (SD3, 2403.03206, section 3.1 and eq. 23).

    `how` spreads u over [0, 1): `uniform`, or `logit_normal`, the sigmoid of a standard normal,
    the middle more often than the ends. `shift` s then moves it to s u / (1 + (s - 1) u).
    """
    spread = jax.random.uniform if how == "uniform" else _logit_normal
    u = spread(key, shape)
    moved = shift * u / (1 + (shift - 1) * u)
    return jnp.minimum((moved * levels).astype(jnp.int32), levels - 1)


def _logit_normal(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    return jax.nn.sigmoid(jax.random.normal(key, shape))


def drop_captions(
    key: Key[Array, ""], ids: Int[Array, "b n"], null: Int[Array, "n"], rate: float
) -> tuple[Int[Array, "b n"], Bool[Array, "b"]]:
    """`ids` with each caption replaced by the null caption with probability `rate`, independently.

    What classifier-free guidance needs (2207.12598, algorithm 1). Also says which were dropped.
    """
    dropped = jax.random.bernoulli(key, rate, (len(ids),))
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
    template = abstract(UNet2DConditionModel, config.model, dtype=dtype)

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

    def loss(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, ""]
    ) -> tuple[Array, Metrics]:
        latent_key, drop_key, time_key, noise_key = jax.random.split(key, 4)
        x0, context = encode(frozen, batch, latent_key, drop_key)
        value = denoising_loss(
            config,
            lambda x, t: assemble(template, params)(x, t, context),
            x0,
            draw_times(
                time_key, x0.shape[:1], config.schedule.levels, config.times, config.time_shift
            ),
            jax.random.normal(noise_key, x0.shape, x0.dtype),
        )
        return value, {"latent_std": jnp.std(x0)}

    return Learner(
        weights(template), functools.partial(initial_weights, template), loss, rules=UNET
    )


def encoded(
    vae: AutoencoderKL, images: Float[Array, "b h2 w2 3"], key: Key[Array, ""]
) -> Float[Array, "b h w c"]:
    """Scaled latents of pictures, drawn from the encoder's distribution."""
    return vae.scale(sample_latents(*vae.encode(images), key))


def denoising_loss(
    config: DiffusionObjective,
    network: Callable[[Array, Array], Array],
    x0: Float[Array, "b h w c"],
    t: Int[Array, "b"],
    eps: Float[Array, "b h w c"],
) -> Float[Array, ""]:
    """The weighted squared error of `network(x_t, t)` at x_t = alpha x0 + sigma eps."""
    alpha, sigma = config.schedule.gather(t)
    kind = config.prediction_type
    output = network(diffuse(x0, eps, alpha, sigma), t)
    weight = loss_weights(config.weighting, kind, snr(alpha, sigma), config.gamma)
    return mse(output, target(kind, x0, eps, alpha, sigma), weight)
