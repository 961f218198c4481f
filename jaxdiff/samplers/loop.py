"""The sampling loop: pure, compiled once, in chunks whose ends are data."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float, Int, Key, PyTree
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.timesteps import NoiseLevel, TimestepGrid
from jaxdiff.samplers.noise import step_noise
from jaxdiff.samplers.rule import Carry, Sampler

# A number for the denoiser in force at a level; guidance may have several on the way.
Phase = Callable[[NoiseLevel], int | Int[Array, ""]]


def _one_phase(level: NoiseLevel) -> int:
    del level
    return 0


class Known(NamedTuple):
    """Latents of which a part is given: after every step it is put back, as noisy as x is there."""

    x0: Float[Array, "b h w c"]
    eps: Float[Array, "b h w c"]
    mask: Float[Array, "b h w 1"]  # 1 where the sampler draws, 0 where x0 stays

    def hold(
        self, x: Float[Array, "b h w c"], level: NoiseLevel, last: bool | Bool[Array, ""]
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
    grid: TimestepGrid,
    keys: Key[Array, "b"],
    start: Int[Array, ""],
    stop: Int[Array, ""],
    *,
    sampler: Sampler,
    phase: Phase = _one_phase,
    known: Known | None = None,
) -> Carry:
    """The state after the steps start, ..., stop - 1.

    Where the `phase` changes the denoiser is another one, and a sampler that looks back begins
    anew: what it remembers says nothing of the steps to come.

    A compiled `advance` gives in chunks bit for bit what it gives in one run, so progress, previews
    and interruption need no callback. Everything here is traced but the denoiser and the sampler.
    """

    def step(i: int | Int[Array, ""], carry: Carry) -> Carry:
        def draw() -> Float[Array, "b *d"]:
            return step_noise(keys, i, carry.x.shape[1:], carry.x.dtype)

        before, here, there = (grid.level(j) for j in (jnp.maximum(i - 1, 0), i, i + 1))
        changed = phase(here) != phase(before)
        if changed is not False:
            begun = sampler.init(carry.x)
            forget = functools.partial(jnp.where, changed)
            carry = carry._replace(history=jax.tree.map(forget, begun, carry.history))
        carry = sampler.step(denoise, carry, here, there, draw)
        if known is None:
            return carry
        return carry._replace(x=known.hold(carry.x, there, i + 1 == grid.num_steps))

    return jax.lax.fori_loop(start, stop, step, carry)


def sample(
    denoise: Denoiser,
    latents: Float[Array, "b *d"],
    grid: TimestepGrid,
    keys: Key[Array, "b"],
    *,
    sampler: Sampler,
    memory: PyTree = (),
    phase: Phase = _one_phase,
) -> Float[Array, "b *d"]:
    """All steps of the grid: from unit-variance noise to latents."""
    carry = begin(grid.init_noise_sigma * latents, sampler=sampler, memory=memory)
    ends = jnp.int32(0), grid.num_steps
    return advance(denoise, carry, grid, keys, *ends, sampler=sampler, phase=phase).x
