"""Columns of batches that a training makes of their images."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, Key
from jaxdiff.families.base import Family
from jaxdiff.families.extras import LOW_RESOLUTION, LOW_RESOLUTION_LEVEL, LOW_RESOLUTION_NOISE
from jaxdiff.families.image_embeddings import IMAGE_EMBEDS, NEGATIVE
from jaxdiff.models.image_processor import CLIPImageProcessor
from jaxdiff.training.step import per_sample_normal, per_sample_split, per_sample_uniform

# (encoders, batch, key) -> columns of the batch
MakeColumns = Callable[..., dict[str, Array]]


def columns_of_images(
    family: Family, enlargement: int = 4, image_processor: CLIPImageProcessor | None = None
) -> MakeColumns | None:
    """What makes the columns that a family's network reads or generates; None if there are none.

    `enlargement` is that of networks of pixels that enlarge images, `image_processor` that of the
    image encoder of networks with embeddings of images.
    """
    if not family.enlarges and image_processor is None:
        return None

    def make(
        encoders: Mapping[str, Any], batch: Mapping[str, Array], key: Key[Array, "..."]
    ) -> dict[str, Array]:
        """InputError for a batch of latents."""
        if "image" not in batch:
            raise InputError("data: got cached latents, expected images: columns are made of them")
        images, columns = batch["image"], {}
        if image_processor is not None:
            encoder = encoders[str(family.image_encoder)]
            columns |= embedding_columns(encoder, image_processor, images)
        if family.enlarges:
            size = images.shape[1:3]
            latent_size = family.codec(encoders).latent_shape(*size)[:-1]
            factor = size[0] // latent_size[0]
            factor = enlargement if factor == 1 else factor  # as much as latents are smaller
            columns |= low_resolution_columns(images, factor, latent_size, key)
        return columns

    return make


def embedding_columns(
    encoder: Any, image_processor: CLIPImageProcessor, images: Float[Array, "b h w 3"]
) -> dict[str, Float[Array, "b d"]]:
    """The embeddings of images in [-1, 1], and for each that of an image of zeros."""
    pixels = image_processor(images)
    embeds, null = (encoder(x).pooled.astype(jnp.float32) for x in (pixels, 0 * pixels[:1]))
    return {IMAGE_EMBEDS: embeds, NEGATIVE: jnp.broadcast_to(null, embeds.shape)}


def low_resolution_columns(
    images: Float[Array, "b h w 3"],
    factor: int,
    latent_size: tuple[int, ...],
    key: Key[Array, "..."],
) -> dict[str, Array]:
    """Images to enlarge, of a `factor`th of the side, with noise (2205.11487, section 2.4).

    The levels of the noise, whose size is `latent_size`, are uniform. InputError for sides that are
    no multiples of the factor.
    """
    b, height, width, _ = images.shape
    if height % factor or width % factor:
        raise InputError(
            f"objective.enlargement: got {factor}, expected a divisor of the sides {height}x{width}"
        )
    noise_key, level_key = per_sample_split(key, b, 2)
    return {
        LOW_RESOLUTION: shrink(images, factor),
        LOW_RESOLUTION_NOISE: per_sample_normal(noise_key, (b, *latent_size, 3)),
        LOW_RESOLUTION_LEVEL: per_sample_uniform(level_key, (b,)),
    }


def shrink(images: Float[Array, "b h w 3"], factor: int) -> Float[Array, "b h3 w3 3"]:
    """The means of squares of `factor` pixels a side."""
    b, height, width, channels = images.shape
    squares = images.reshape(b, height // factor, factor, width // factor, factor, channels)
    return squares.mean((2, 4))
