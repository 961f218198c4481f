"""The sampling loop: pure, compiled once, in chunks whose ends are data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float, Int, Key, PyTree
from jaxdiff.diffusion.predictions import Denoiser, per_image, select
from jaxdiff.diffusion.timesteps import NoiseLevel, TimestepGrid
from jaxdiff.samplers.base import Sampler, SamplingState
from jaxdiff.samplers.noise import step_noise

# A number for the guidance formula in force at a level; see Guidance.schedule_phase.
GuidancePhaseFn = Callable[[NoiseLevel], int | Int[Array, "b"]]


def _constant_phase(level: NoiseLevel) -> int:
    del level
    return 0


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


def init_state(
    x: Float[Array, "b *d"], *, sampler: Sampler, guidance_state: PyTree = ()
) -> SamplingState:
    """The state before the first step, from x at its level and the initial guidance state."""
    return SamplingState(
        x=x, x0=jnp.zeros_like(x), sampler_state=sampler.init(x), guidance_state=guidance_state
    )


def run_steps(
    denoise: Denoiser,
    state: SamplingState,
    grid: TimestepGrid,
    keys: Key[Array, "b"],
    start: Int[Array, ""],
    stop: Int[Array, ""],
    *,
    sampler: Sampler,
    guidance_phase: GuidancePhaseFn = _constant_phase,
    inpainting_mask: InpaintingMask | None = None,
) -> SamplingState:
    """The state after the steps start, ..., stop - 1, counted from `grid.first` of each image.

    Images whose steps are done rest: nothing of their state changes. Where `guidance_phase`
    changes, the denoiser changes, and a multistep sampler restarts: its history belongs to the old
    denoiser.

    A compiled `run_steps` gives in chunks bit for bit what it gives in one run, so progress,
    previews and interruption need no callback. Everything here is traced but the denoiser and the
    sampler.
    """

    grid = grid.for_images(len(state.x))

    def step(k: int | Int[Array, ""], state: SamplingState) -> SamplingState:
        active, i = grid.first + k < grid.last, jnp.minimum(grid.first + k, grid.last - 1)
        before, here, there = (
            grid.level(j, state.x.ndim)._replace(active=active)
            for j in (jnp.maximum(i - 1, 0), i, i + 1)
        )

        def noise_fn() -> Float[Array, "b *d"]:
            return step_noise(keys, i, state.x.shape[1:], state.x.dtype)

        began, changed = state, guidance_phase(here) != guidance_phase(before)
        if changed is not False:
            history = select(jnp.asarray(changed), sampler.init(state.x), state.sampler_state)
            began = state._replace(sampler_state=history)
        new = sampler.step(denoise, began, here, there, noise_fn)
        if inpainting_mask is not None:
            new = new._replace(x=inpainting_mask.blend(new.x, there, i + 1 == grid.num_steps))
        return select(active, new, state)

    return jax.lax.fori_loop(start, stop, step, state)


def sample(
    denoise: Denoiser,
    latents: Float[Array, "b *d"],
    grid: TimestepGrid,
    keys: Key[Array, "b"],
    *,
    sampler: Sampler,
    guidance_state: PyTree = (),
    guidance_phase: GuidancePhaseFn = _constant_phase,
) -> Float[Array, "b *d"]:
    """All steps of the grid: from unit-variance noise to latents."""
    x = per_image(grid.init_noise_sigma, latents) * latents
    state = init_state(x, sampler=sampler, guidance_state=guidance_state)
    ends = jnp.int32(0), jnp.max(grid.last - grid.first)
    return run_steps(
        denoise, state, grid, keys, *ends, sampler=sampler, guidance_phase=guidance_phase
    ).x
