"""Inpainting with any sampler: what is known is put back after every step and within it."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float, PyTree
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, Prediction, per_image


class InpaintingMask(NamedTuple):
    """Latents of which a part is known: it replaces x there, with noise added.

    So after every step, and where a method calls the network again on the way: the rest of the
    image then sees the known part at the level that it is asked for. Without that a method of
    higher order is of first order in inpainting.
    """

    x0: Float[Array, "b h w c"]
    eps: Float[Array, "b h w c"]
    mask: Float[Array, "b h w 1"]  # 1 where the sampler draws, 0 where x0 stays

    def blend(
        self, x: Float[Array, "b h w c"], level: NoiseLevel, last: Bool[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        """`x` with the known part in its place; after the last step without noise."""
        noisy = level.alpha * self.x0 + level.sigma * self.eps
        return jnp.where(self.mask > 0, x, jnp.where(per_image(last, x), self.x0, noisy))

    def within_steps(self, denoise: Denoiser) -> Denoiser:
        """`denoise` that sees the known part at levels below the one where a step begins."""

        def denoise_with_known(
            x: Array, level: NoiseLevel, guidance_state: PyTree
        ) -> tuple[Prediction, PyTree]:
            below = level.sigma / level.alpha < per_image(level.step_start_sigma, x)
            noisy = level.alpha * self.x0 + level.sigma * self.eps
            x = jnp.where(below & (self.mask == 0), noisy, x)
            return denoise(x, level, guidance_state)

        return denoise_with_known
