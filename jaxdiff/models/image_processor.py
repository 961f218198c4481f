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

    def __call__(self, pictures: Float[Array, "b h w 3"]) -> Float[Array, "b s s 3"]:
        """Pictures in [-1, 1], resized and normalised."""
        shape = (len(pictures), self.size, self.size, 3)
        if pictures.shape != shape:
            pictures = jax.image.resize(pictures, shape, "cubic")
        mean, std = (jnp.asarray(x, pictures.dtype) for x in (self.mean, self.std))
        return (pictures / 2 + 0.5 - mean[None, None, None]) / std[None, None, None]
