"""What the VAE of latent diffusion minimises: reconstruction, and divergence from N(0, 1)."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Dtype, Float, Int, Key, NDArray
from jaxdiff.models.build import abstract, initial_weights, param_dict, with_params
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.parallel.sharding import VAE
from jaxdiff.training.config import VAEObjective
from jaxdiff.training.objectives import Learner, Metrics, Params
from jaxdiff.training.objectives.adversarial import contest, picture
from jaxdiff.training.objectives.perceptual import Eye
from jaxdiff.training.per_sample_random import per_sample_normal

T = TypeVar("T")
OURS, THEIRS = "vae.", "discriminator."  # in front of weights where there are both


def sample_latents(
    mean: Float[Array, "b *d"], logvar: Float[Array, "b *d"], key: Key[Array, "..."]
) -> Float[Array, "b *d"]:
    """z = mean + exp(logvar / 2) noise (1312.6114, eq. 10)."""
    return mean + jnp.exp(0.5 * logvar) * per_sample_normal(key, mean.shape, mean.dtype)


def divergence(mean: Float[Array, "*b"], logvar: Float[Array, "*b"]) -> Float[Array, ""]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats per latent element (1312.6114, appendix B)."""
    return 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)


def edge_error(images: Float[Array, "b h w c"], other: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Mean absolute error of the differences between neighbours, down and across.

    A blurred edge costs little in the pixels and much in their differences.
    """
    error = images - other
    down = jnp.abs(jnp.diff(error, axis=1))
    across = jnp.abs(jnp.diff(error, axis=2))
    return 0.5 * (jnp.mean(down) + jnp.mean(across))


class Frozen(NamedTuple):
    """What the loss reads and no gradient changes."""

    encoder: Mapping[str, Any] = {}  # of the VAE, where only the decoder is trained
    eye: Mapping[str, Any] = {}  # the vision tower, where pictures are compared by one
    contest: Any = np.float32(1)  # 1 once the discriminator has begun, 0 before


def whole_vae(config: VAEObjective, params: Mapping[str, Any], frozen: Frozen) -> dict[str, Any]:
    """All weights of the VAE, by their own paths."""
    ours = _under(OURS, params) if config.adversarial else params
    return {**ours, **frozen.encoder}


def is_decoder(path: str) -> bool:
    """Whether the weight at `path` of a VAE is of what makes pictures of latents."""
    return path.startswith(("decoder.", "post_quant_conv."))


def _under(prefix: str, params: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def vae_learner(
    config: VAEObjective,
    dtype: Dtype = jnp.float32,
    *,
    given: Mapping[str, Any] | None = None,
    eye: Eye | None = None,
) -> Learner:
    """The VAE's learner; batches have `image` (b, h, w, 3) in [-1, 1].

    With a discriminator the table of parameters has those of both under `vae.` and
    `discriminator.`. `given` are weights for the VAE to begin with.
    """
    template = abstract(AutoencoderKL, config.model, dtype=dtype)
    channels = config.model.out_channels
    critic = abstract(PatchDiscriminator, config.discriminator, channels, dtype=dtype)
    compared = {"l1": config.l1_weight, "l2": config.l2_weight, "edge": config.edge_weight}

    def compare(
        rebuilt: Float[Array, "b h w c"], images: Float[Array, "b h w c"], frozen: Frozen
    ) -> tuple[Array, Metrics]:
        parts = {
            "l1": jnp.mean(jnp.abs(rebuilt - images)),
            "l2": jnp.mean((rebuilt - images) ** 2),
            "edge": edge_error(rebuilt, images),
        }
        total = jnp.asarray(sum(compared[name] * part for name, part in parts.items()))
        if eye is None:
            return total, parts
        seen = eye.difference(frozen.eye, rebuilt, images)
        return total + config.perceptual_weight * seen, parts | {"perceptual": seen}

    def loss(
        params: Params, frozen: Frozen, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        model, images = with_params(template, whole_vae(config, params, frozen)), batch["image"]
        mean, logvar = model.encode(images)
        features = model.decoder_features(sample_latents(mean, logvar, key))
        layer = model.decoder.conv_out
        total, parts = compare(picture(layer, features), images, frozen)
        parts["kl"] = divergence(mean, logvar)
        if not config.freeze_encoder:
            total += config.kl_weight * parts["kl"]
        if not config.adversarial:
            return total, parts
        rebuilding = (lambda x: compare(x, images, frozen)[0]) if adaptive else None
        found = contest(critic, _under(THEIRS, params), layer, features, images, rebuilding)
        amount = config.adversarial_weight * found.balance
        total += frozen.contest * (amount * found.decoder + found.discriminator)
        parts |= {"adversarial": found.decoder, "discriminator": found.discriminator}
        return total, parts | {"adversarial_amount": frozen.contest * amount}

    def at(frozen: Frozen, step: Int[Array, ""]) -> Frozen:
        begun = step >= config.adversarial_start
        return frozen._replace(contest=begun.astype(jnp.float32))

    adaptive = config.adversarial_adaptive
    init = functools.partial(_initial, config, template, critic, given)
    shapes = _table(config, param_dict(template), param_dict(critic))
    return Learner(shapes, init, loss, rules=VAE, at=at)


def _table(config: VAEObjective, vae: Mapping[str, T], critic: Mapping[str, T]) -> dict[str, T]:
    """What is trained of both networks' weights."""
    learnt = {k: v for k, v in vae.items() if is_decoder(k) or not config.freeze_encoder}
    if not config.adversarial:
        return learnt
    tables = {OURS: learnt, THEIRS: critic}
    return {prefix + k: v for prefix, table in tables.items() for k, v in table.items()}


def _initial(
    config: VAEObjective,
    template: AutoencoderKL,
    critic: PatchDiscriminator,
    given: Mapping[str, Any] | None,
    seed: int,
) -> Iterator[tuple[str, NDArray]]:
    """What a training begins with, one weight at a time."""
    begun = given.items() if given is not None else initial_weights(template, seed)
    for path, array in begun:
        yield from _table(config, {path: np.asarray(array, np.float32)}, {}).items()
    for path, array in initial_weights(critic, seed) if config.adversarial else ():
        yield THEIRS + path, array


def reconstruct(model: AutoencoderKL, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """`images` through the latents' means and back."""
    return model.decode(model.encode(images)[0])


def latent_moments(
    model: AutoencoderKL, images: Float[Array, "b h w c"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean and mean square of the unscaled latents of `images`, their sampling noise included."""
    mean, logvar = model.encode(images)
    return jnp.mean(mean), jnp.mean(mean**2 + jnp.exp(logvar))
