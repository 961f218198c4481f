"""Reconstruction, edges and divergence from N(0, 1): what the VAE of latent diffusion minimises."""

import functools

import jax.numpy as jnp

from jaxdiff.core.types import Array, Dtype, Float, Key, PyTree
from jaxdiff.models.build import abstract, assemble, initial_weights, weights
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.parallel.rules import VAE
from jaxdiff.training.config import VAEObjective
from jaxdiff.training.draws import normal
from jaxdiff.training.objectives import Learner, Metrics, Params


def sample_latents(
    mean: Float[Array, "b *d"], logvar: Float[Array, "b *d"], key: Key[Array, "..."]
) -> Float[Array, "b *d"]:
    """z = mean + exp(logvar / 2) noise (1312.6114, eq. 10)."""
    return mean + jnp.exp(0.5 * logvar) * normal(key, mean.shape, mean.dtype)


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


def vae_learner(config: VAEObjective, dtype: Dtype = jnp.float32) -> Learner:
    """The VAE's learner; batches have `image` (b, h, w, 3) in [-1, 1], nothing is frozen."""
    template = abstract(AutoencoderKL, config.model, dtype=dtype)

    def loss(
        params: Params, frozen: PyTree, batch: dict[str, Array], key: Key[Array, "..."]
    ) -> tuple[Array, Metrics]:
        model, images = assemble(template, params), batch["image"]
        mean, logvar = model.encode(images)
        rebuilt = model.decode(sample_latents(mean, logvar, key))
        parts = {
            "l1": jnp.mean(jnp.abs(rebuilt - images)),
            "l2": jnp.mean((rebuilt - images) ** 2),
            "edge": edge_error(rebuilt, images),
            "kl": divergence(mean, logvar),
        }
        total = (
            config.l1_weight * parts["l1"]
            + config.l2_weight * parts["l2"]
            + config.edge_weight * parts["edge"]
            + config.kl_weight * parts["kl"]
        )
        return total, parts

    return Learner(weights(template), functools.partial(initial_weights, template), loss, rules=VAE)


def reconstruct(model: AutoencoderKL, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """`images` through the latents' means and back."""
    return model.decode(model.encode(images)[0])


def latent_moments(
    model: AutoencoderKL, images: Float[Array, "b h w c"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean and mean square of the unscaled latents of `images`, their sampling noise included."""
    mean, logvar = model.encode(images)
    return jnp.mean(mean), jnp.mean(mean**2 + jnp.exp(logvar))
