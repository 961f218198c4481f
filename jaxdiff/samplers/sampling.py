"""A whole sampling: all steps of a grid."""

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Key, PyTree
from jaxdiff.diffusion.denoising import Denoiser, per_image
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.samplers.base import GuidancePhaseFn, Sampler, init_state, run_steps


def sample(
    denoise: Denoiser,
    latents: Float[Array, "b *d"],
    grid: TimestepGrid,
    keys: Key[Array, "b"],
    *,
    sampler: Sampler,
    guidance_state: PyTree = (),
    guidance_phase: GuidancePhaseFn = lambda _: 0,
) -> Float[Array, "b *d"]:
    """All steps of the grid: from unit-variance noise to latents."""
    x = per_image(grid.init_noise_sigma, latents) * latents
    state = init_state(x, sampler=sampler, guidance_state=guidance_state)
    ends = jnp.int32(0), jnp.max(grid.last - grid.first)
    return run_steps(
        denoise, state, grid, keys, *ends, sampler=sampler, guidance_phase=guidance_phase
    ).x
