"""A whole sampling: its first noise, and all steps of a grid."""

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Key, PyTree
from jaxdiff.diffusion.denoising import Denoiser, per_image
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.samplers.base import (
    INITIAL_NOISE_STEP,
    GuidancePhaseFn,
    Sampler,
    init_state,
    run_steps,
    step_noise,
)


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


def initial_noise(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b *d"]:
    """The standard normal latents of `shape` (h, w, c) that each image starts from, in float32."""
    return step_noise(keys, INITIAL_NOISE_STEP, shape, jnp.dtype(jnp.float32))
