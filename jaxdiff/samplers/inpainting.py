"""Inpainting with any sampler: what is known is put back after every step."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float
from jaxdiff.diffusion.denoising import NoiseLevel, per_image


class InpaintingMask(NamedTuple):
    """Latents of which a part is known: after every step it replaces x there, with noise added."""

    x0: Float[Array, "b h w c"]
    eps: Float[Array, "b h w c"]
    mask: Float[Array, "b h w 1"]  # 1 where the sampler draws, 0 where x0 stays

    def blend(
        self, x: Float[Array, "b h w c"], level: NoiseLevel, last: Bool[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        """`x` with the known part in its place; after the last step without noise."""
        noisy = level.alpha * self.x0 + level.sigma * self.eps
        return jnp.where(self.mask > 0, x, jnp.where(per_image(last, x), self.x0, noisy))
