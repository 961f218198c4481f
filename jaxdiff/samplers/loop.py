"""The sampling loop: pure, compiled once, in chunks whose ends are data."""

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Int, Key, PyTree
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.timesteps import Grid
from jaxdiff.samplers.noise import step_noise
from jaxdiff.samplers.rule import Carry, Sampler


def begin(
    latents: Float[Array, "b *d"], grid: Grid, *, sampler: Sampler, memory: PyTree = ()
) -> Carry:
    """The state before step 0, from unit-variance noise and the initial memory of the guidance."""
    x = grid.start * latents
    return Carry(x=x, x0=jnp.zeros_like(x), history=sampler.init(x), memory=memory)


def advance(
    denoise: Denoiser,
    carry: Carry,
    grid: Grid,
    keys: Key[Array, "b"],
    start: Int[Array, ""],
    stop: Int[Array, ""],
    *,
    sampler: Sampler,
) -> Carry:
    """The state after the steps start, ..., stop - 1.

    A compiled `advance` gives in chunks bit for bit what it gives in one run, so progress, previews
    and interruption need no callback. Everything here is traced but the denoiser and the sampler.
    """

    def step(i: int | Int[Array, ""], carry: Carry) -> Carry:
        def draw() -> Float[Array, "b *d"]:
            return step_noise(keys, i, carry.x.shape[1:], carry.x.dtype)

        return sampler.step(denoise, carry, grid.level(i), grid.level(i + 1), draw)

    return jax.lax.fori_loop(start, stop, step, carry)


def sample(
    denoise: Denoiser,
    latents: Float[Array, "b *d"],
    grid: Grid,
    keys: Key[Array, "b"],
    *,
    sampler: Sampler,
    memory: PyTree = (),
) -> Float[Array, "b *d"]:
    """All steps of the grid: from unit-variance noise to latents."""
    carry = begin(latents, grid, sampler=sampler, memory=memory)
    return advance(denoise, carry, grid, keys, jnp.int32(0), grid.steps, sampler=sampler).x
