"""The loss of a VAE: reconstruction, KL divergence, and optionally perceptual and GAN losses."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Dtype, Float, Int, Key, NDArray
from jaxdiff.diffusion.denoising import per_image
from jaxdiff.models.build import abstract, initial_weights, param_dict, with_params
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.vae import AutoencoderKL, sample_latents
from jaxdiff.parallel.sharding import VAE
from jaxdiff.training.config import VAEObjective
from jaxdiff.training.objectives.adversarial import gan_loss, last_layer_image
from jaxdiff.training.objectives.perceptual import PerceptualModel
from jaxdiff.training.step import (
    Metrics,
    Params,
    TrainingTask,
    per_sample_normal,
    per_sample_split,
    per_sample_uniform,
)

T = TypeVar("T")
VAE_PREFIX, DISCRIMINATOR_PREFIX = (
    "vae.",
    "discriminator.",
)  # prefixes of paths, if there is a discriminator


def decoder_input(
    config: VAEObjective,
    mean: Float[Array, "b *d"],
    logvar: Float[Array, "b *d"],
    key: Key[Array, "..."],
) -> Float[Array, "b *d"]:
    """Latents for the decoder, with the noise of `latent_noise`."""
    if not config.latent_noise:
        return sample_latents(mean, logvar, per_sample_normal(key, mean.shape, mean.dtype))
    b = len(mean)
    latent_key, std_key, noise_key = per_sample_split(key, b, 3)
    z = sample_latents(mean, logvar, per_sample_normal(latent_key, mean.shape, mean.dtype))
    largest = config.latent_noise / config.model.scaling_factor
    std = per_sample_uniform(std_key, (b,), 0.0, largest).astype(mean.dtype)
    noise = per_sample_normal(noise_key, mean.shape, mean.dtype)
    return z + per_image(std, mean) * noise


def kl_divergence(mean: Float[Array, "*b"], logvar: Float[Array, "*b"]) -> Float[Array, ""]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats per latent element (1312.6114, appendix B)."""
    return 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)


def edge_loss(images: Float[Array, "b h w c"], other: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Mean absolute error of differences of neighbouring pixels, vertical and horizontal.

    A blurred edge costs little in pixels and much in their differences.
    """
    error = images - other
    down = jnp.abs(jnp.diff(error, axis=1))
    across = jnp.abs(jnp.diff(error, axis=2))
    return 0.5 * (jnp.mean(down) + jnp.mean(across))


class Frozen(NamedTuple):
    """Inputs of the loss that are not trained."""

    encoder: Mapping[str, Any] = {}  # of the VAE, with freeze_encoder
    perceptual: Mapping[str, Any] = {}  # the vision tower of the perceptual loss
    adversarial_on: Any = np.float32(1)  # 1 from adversarial_start on, 0 before


def merge_vae_params(
    config: VAEObjective, params: Mapping[str, Any], frozen: Frozen
) -> dict[str, Any]:
    """All weights of the VAE, by their own paths."""
    vae_params = _strip_prefix(VAE_PREFIX, params) if config.adversarial else params
    return {**vae_params, **frozen.encoder}


def is_decoder(path: str) -> bool:
    """Whether the weight at `path` of a VAE belongs to the decoder."""
    return path.startswith(("decoder.", "post_quant_conv."))


def _strip_prefix(prefix: str, params: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def reconstruction_loss(
    config: VAEObjective,
    perceptual_model: PerceptualModel | None,
    frozen: Frozen,
    images: Float[Array, "b h w c"],
    reconstructed: Float[Array, "b h w c"],
) -> tuple[Array, Metrics]:
    """The weighted sum of the differences of reconstructed images, and each of them."""
    parts = {
        "l1": jnp.mean(jnp.abs(reconstructed - images)),
        "l2": jnp.mean((reconstructed - images) ** 2),
        "edge": edge_loss(reconstructed, images),
    }
    weights = {"l1": config.l1_weight, "l2": config.l2_weight, "edge": config.edge_weight}
    total = jnp.asarray(sum(weights[name] * part for name, part in parts.items()))
    if perceptual_model is None:
        return total, parts
    perceptual = perceptual_model.loss(frozen.perceptual, reconstructed, images)
    return total + config.perceptual_weight * perceptual, parts | {"perceptual": perceptual}


def vae_task(
    config: VAEObjective,
    dtype: Dtype = jnp.float32,
    *,
    pretrained: Callable[[], Mapping[str, Any]] | None = None,
    perceptual_model: PerceptualModel | None = None,
) -> TrainingTask:
    """The VAE's task; batches have `image` (b, h, w, 3) in [-1, 1].

    With a discriminator the paths of parameters start with `vae.` and `discriminator.`.
    `pretrained` reads initial weights of the VAE.
    """
    template = abstract(AutoencoderKL, config.model, dtype=dtype)
    channels = config.model.out_channels
    discriminator = abstract(PatchDiscriminator, config.discriminator, channels, dtype=dtype)

    def loss(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        model, images = (
            with_params(template, merge_vae_params(config, params, frozen)),
            batch["image"],
        )
        mean, logvar = model.encode(images)
        features = model.decoder_features(decoder_input(config, mean, logvar, key))
        layer = model.decoder.conv_out
        compare = functools.partial(reconstruction_loss, config, perceptual_model, frozen, images)
        total, parts = compare(last_layer_image(layer, features))
        parts["kl"] = kl_divergence(mean, logvar)
        if not config.freeze_encoder:
            total += config.kl_weight * parts["kl"]
        if not config.adversarial:
            return total, parts
        image_loss = (lambda x: compare(x)[0]) if config.adversarial_adaptive else None
        gan = gan_loss(
            discriminator,
            _strip_prefix(DISCRIMINATOR_PREFIX, params),
            layer,
            features,
            images,
            image_loss,
        )
        weight = config.adversarial_weight * gan.adaptive_weight
        total += frozen.adversarial_on * (weight * gan.generator + gan.discriminator)
        parts |= {"adversarial": gan.generator, "discriminator": gan.discriminator}
        return total, parts | {"adversarial_weight": frozen.adversarial_on * weight}

    def frozen_at_step(frozen: Frozen, step: Int[Array, ""]) -> Frozen:
        started = step >= config.adversarial_start
        return frozen._replace(adversarial_on=started.astype(jnp.float32))

    init = functools.partial(_initial_params, config, template, discriminator, pretrained)
    shapes = _trained_params(config, param_dict(template), param_dict(discriminator))
    return TrainingTask(shapes, init, loss, rules=VAE, frozen_at_step=frozen_at_step)


def _trained_params(
    config: VAEObjective, vae: Mapping[str, T], discriminator: Mapping[str, T]
) -> dict[str, T]:
    """The trained weights of both networks, with prefixes if there are both."""
    trained = {k: v for k, v in vae.items() if is_decoder(k) or not config.freeze_encoder}
    if not config.adversarial:
        return trained
    tables = {VAE_PREFIX: trained, DISCRIMINATOR_PREFIX: discriminator}
    return {prefix + k: v for prefix, table in tables.items() for k, v in table.items()}


def _initial_params(
    config: VAEObjective,
    template: AutoencoderKL,
    discriminator: PatchDiscriminator,
    pretrained: Callable[[], Mapping[str, Any]] | None,
    seed: int,
) -> Iterator[tuple[str, NDArray]]:
    """Initial parameters, one at a time."""
    initial = initial_weights(template, seed) if pretrained is None else pretrained().items()
    for path, array in initial:
        yield from _trained_params(config, {path: np.asarray(array, np.float32)}, {}).items()
    for path, array in initial_weights(discriminator, seed) if config.adversarial else ():
        yield DISCRIMINATOR_PREFIX + path, array


def reconstruct(model: AutoencoderKL, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """`images` encoded to the means of latents and decoded."""
    return model.decode(model.encode(images)[0])


def latent_moments(
    model: AutoencoderKL, images: Float[Array, "b h w c"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean and mean square of the unscaled latents of `images`, their sampling noise included."""
    mean, logvar = model.encode(images)
    return jnp.mean(mean), jnp.mean(mean**2 + jnp.exp(logvar))
