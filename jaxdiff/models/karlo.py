"""Karlo's networks of two parts: a decoder with its projection, and a pair of enlarging UNets.

Each part is a component of its own; put together they are called as one network. Karlo is an
unCLIP (2204.06125).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxdiff.core.types import Array, Bool, Float, Int
from jaxdiff.models.unclip import UnCLIPTextProjModel
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.unet.unet_2d import UNet2DModel

LAST = 0.5  # times below it are those of the last step, which is 0


class KarloDecoder(nnx.Module):
    """A UNet of pixels whose context and class labels are projections of a text and an image."""

    def __init__(self, decoder: UNet2DConditionModel, text_proj: UnCLIPTextProjModel):
        self.config: Any = decoder.config
        self.dtype = decoder.dtype
        self.decoder = decoder
        self.text_proj = text_proj

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"] | Int[Array, "b"],
        context: Float[Array, "b n d"],
        *,
        context_mask: Bool[Array, "b n"],
        text_embeds: Float[Array, "b d"],
        image_embeds: Float[Array, "b d"],
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The network's output for noisy pixels, in the dtype of `sample`.

        `timesteps` count the steps of the training schedule. `context` are text states, of which
        those without `context_mask` are padding, `text_embeds` the pooled text embeddings and
        `image_embeds` those of images. InputError for shapes that the configs do not say.
        """
        tokens, labels = self.text_proj(image_embeds, text_embeds, context)
        more = self.text_proj.config.clip_extra_context_tokens
        mask = jnp.pad(context_mask, ((0, 0), (more, 0)), constant_values=True)
        return self.decoder(
            sample,
            timesteps,
            tokens,
            context_mask=mask,
            class_labels=labels,
            perturbed=perturbed,
        )

    def check_perturbed(self) -> None:
        """InputError for a UNet without attention that a guidance rule can perturb."""
        self.decoder.check_perturbed()


class KarloSuperResolution(nnx.Module):
    """Two UNets that enlarge images: one for the last step, at time 0, and one for the others."""

    def __init__(self, first: UNet2DModel, last: UNet2DModel):
        self.config: Any = first.config
        self.dtype = first.dtype
        self.first = first
        self.last = last

    @property
    def unet_config(self) -> UNet2DConditionConfig:
        """The config of both in the fields of UNet2DConditionModel."""
        return self.first.unet_config

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Float[Array, "b"] | Int[Array, "b"],
        *,
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The network's output for noisy pixels and, as further channels, the image to enlarge.

        Only the UNet runs that some image of the batch needs.
        """
        last = timesteps < LAST
        shape = (*sample.shape[:-1], self.config.out_channels)

        def run(unet: UNet2DModel, needed: Bool[Array, ""]) -> Float[Array, "b h w o"]:
            def call() -> Array:
                return unet(sample, timesteps, perturbed=perturbed)

            return lax.cond(needed, call, lambda: jnp.zeros(shape, sample.dtype))

        before, at_end = run(self.first, ~last.all()), run(self.last, last.any())
        return jnp.where(last[:, None, None, None], at_end, before)

    def check_perturbed(self) -> None:
        """InputError: the UNets have no attention."""
        self.first.check_perturbed()


class KarloDecoderAdapter(UNetAdapter):
    """How a decoder is called with its projection."""

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image: a text of so many tokens, and an image."""
        del size
        width, dtype = self.module.text_proj.config.clip_embeddings_dim, self.module.dtype
        return {
            "context": jax.ShapeDtypeStruct((tokens, width), dtype),
            "context_mask": jax.ShapeDtypeStruct((tokens,), jnp.bool),
            "text_embeds": jax.ShapeDtypeStruct((width,), dtype),
            "image_embeds": jax.ShapeDtypeStruct((width,), jnp.float32),
        }
