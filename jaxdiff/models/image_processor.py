"""The image preprocessing of CLIP."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPImageProcessor:
    """Resize to one size, then normalise by the mean and the deviation of each channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        """Images in [-1, 1], resized and normalised."""
        shape = (len(images), self.size, self.size, 3)
        if images.shape != shape:
            images = jax.image.resize(images, shape, "cubic")
        mean, std = (jnp.asarray(x, images.dtype) for x in (self.mean, self.std))
        return (images / 2 + 0.5 - mean[None, None, None]) / std[None, None, None]
