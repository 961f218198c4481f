"""DDIM inversion: from a clean image to the noise that DDIM brings back to it."""

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Int, PyTree
from jaxdiff.diffusion.denoising import Denoiser, per_image, select
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.samplers.steps import ratio_step


def invert(
    denoise: Denoiser,
    latents: Float[Array, "b *d"],
    grid: TimestepGrid,
    *,
    guidance_state: PyTree = (),
) -> Float[Array, "b *d"]:
    """Unit-variance noise from which `sample` with DDIM, eta = 0, on this grid leads to `latents`.

    The ODE (2010.02502, eq. 14) upwards by Euler's steps through the same levels:
    x'/alpha' = x/alpha + (r' - r) eps with r = sigma / alpha, which is the way down up to errors of
    first order. A network knows no noise of a clean image: the first step asks it about that image,
    at the scale of the level above, as if it were there.
    """

    grid = grid.for_images(len(latents))

    def step(k: Int[Array, ""], state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        x, guidance_state = state
        i, active = jnp.maximum(grid.num_steps - 1 - k, 0), k < grid.num_steps
        low, high = (grid.level(j, x.ndim)._replace(active=active) for j in (i + 1, i))
        asked = jax.tree.map(lambda a, b: jnp.where(k == 0, a, b), high, low)
        (_, eps), new = denoise(asked.alpha / low.alpha * x, asked, guidance_state)
        up = high.alpha / low.alpha * x + ratio_step(low, high) * eps
        return select(active, (up, new), state)

    noise, _ = jax.lax.fori_loop(0, jnp.max(grid.num_steps), step, (latents, guidance_state))
    return noise / per_image(grid.init_noise_sigma, noise)
