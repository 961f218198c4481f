"""The sampling loop: pure, compiled once, in chunks whose ends are data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float, Int, Key, PyTree
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.timesteps import Grid, Level
from jaxdiff.samplers.noise import step_noise
from jaxdiff.samplers.rule import Carry, Sampler


class Known(NamedTuple):
    """Latents of which a part is given: after every step it is put back, as noisy as x is there."""

    x0: Float[Array, "b h w c"]
    eps: Float[Array, "b h w c"]
    mask: Float[Array, "b h w 1"]  # 1 where the sampler draws, 0 where x0 stays

    def hold(
        self, x: Float[Array, "b h w c"], level: Level, last: bool | Bool[Array, ""]
    ) -> Float[Array, "b h w c"]:
        """`x` with the given part in its place; after the last step without noise."""
        noisy = level.alpha * self.x0 + level.sigma * self.eps
        return jnp.where(self.mask > 0, x, jnp.where(last, self.x0, noisy))


def begin(x: Float[Array, "b *d"], *, sampler: Sampler, memory: PyTree = ()) -> Carry:
    """The state before the first step, from x at its level and the guidance's initial memory."""
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
    known: Known | None = None,
) -> Carry:
    """The state after the steps start, ..., stop - 1.

    A compiled `advance` gives in chunks bit for bit what it gives in one run, so progress, previews
    and interruption need no callback. Everything here is traced but the denoiser and the sampler.
    """

    def step(i: int | Int[Array, ""], carry: Carry) -> Carry:
        def draw() -> Float[Array, "b *d"]:
            return step_noise(keys, i, carry.x.shape[1:], carry.x.dtype)

        there = grid.level(i + 1)
        carry = sampler.step(denoise, carry, grid.level(i), there, draw)
        if known is None:
            return carry
        return carry._replace(x=known.hold(carry.x, there, i + 1 == grid.steps))

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
    carry = begin(grid.start * latents, sampler=sampler, memory=memory)
    return advance(denoise, carry, grid, keys, jnp.int32(0), grid.steps, sampler=sampler).x
