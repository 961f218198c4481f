"""Samplers: their interface, the sampling loop, and random draws that belong to one image.

The loop is pure, compiled once, and runs in chunks whose ends are data.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.aliases import rename_sampler
from jaxdiff.core.errors import InputError
from jaxdiff.core.notation import split_options, with_options
from jaxdiff.core.types import Array, Float, Int, Key, PyTree
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, select
from jaxdiff.diffusion.grids import TimestepGrid
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.samplers.inpainting import InpaintingMask

# The standard normal noise of this step, one key per image; deterministic samplers never call it.
NoiseFn = Callable[[], Array]
# A number for the guidance formula in force at a level; see Guidance.phase.
GuidancePhaseFn = Callable[[NoiseLevel], int | Int[Array, "b"]]


class SamplingState(NamedTuple):
    """The state of the loop between two steps; every leaf is (b, ...)."""

    x: Float[Array, "b *d"]
    x0: Float[Array, "b *d"]  # D of the last step: for previews and multistep solvers
    sampler_state: PyTree  # other state of the solver
    guidance_state: PyTree  # state of the guidance rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """A step rule: a frozen choice without arrays."""

    # of convergence where steps change smoothly, of the variance if stochastic; None: not a solver
    order: ClassVar[int | None] = None
    stochastic: ClassVar[bool] = False  # whether it draws noise even where no option asks for it
    stochastic_options: ClassVar[tuple[str, ...]] = ()  # those that ask for it where they are not 0
    # how far results of two programs may be apart in float32: extrapolation multiplies rounding
    rounding: ClassVar[float] = 1e-6
    internal: ClassVar[tuple[str, ...]] = ()  # fields that the model sets, not users
    # whether noise is added back along `Prediction.eps`, be it that of another stream than x0's
    renoises_along_eps: ClassVar[bool] = False

    @property
    def reads_variance(self) -> bool:
        """Whether a step reads `Prediction.variance`, which few networks have."""
        return False

    def check_variance(self, *, learned: bool) -> None:
        """InputError if a step reads a variance that no network has `learned`; never by default."""
        del learned

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """The history before the first step, with leaves (b, ...); none by default."""
        del x
        return ()

    def nfe(
        self, steps: int, *, ends_clean: bool = True, restarts: Sequence[int] = ()
    ) -> list[int]:
        """The denoiser calls of each of `steps` steps.

        `ends_clean`: the last one ends the grid, at sigma 0; `restarts`: the steps that begin
        another phase.
        """
        del ends_clean, restarts
        return [1] * steps

    def for_schedule(self, schedule: Schedule) -> "Sampler":
        """The sampler for a network of this schedule: for levels that are not on the grid."""
        del schedule
        return self

    def with_score(self, score: Callable[[Array, NoiseLevel], Array]) -> "Sampler | None":
        """The sampler moved along k grad log p(y | x); None: the denoiser must be (the default)."""
        del score
        return None

    @abstractmethod
    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """Go from `here` to `there`, calling the denoiser as often as the method needs."""


# By name. The package's __init__ fills it, which any import of this module runs.
SAMPLERS: dict[str, Sampler] = {}


def get_sampler(name: str, eta: float | None = None, *, kind: str = "sampler") -> Sampler:
    """The sampler that a name such as "ddim:eta=0.5" or "heun:s_churn=40" describes.

    `eta` is that option of a sampler which has it, 0 to 1. Errors, InputError, begin with `kind`.
    """
    key, options = split_options(kind, rename_sampler(name))
    sampler = SAMPLERS[one_of(kind, key, SAMPLERS)]
    if eta is not None:
        fitting = [k for k, each in SAMPLERS.items() if hasattr(each, "eta")]
        if key not in fitting:
            raise InputError(
                f"eta: got {eta:g} with sampler {key!r}, "
                f"expected sampler {' or '.join(map(repr, fitting))}"
            )
        if "eta" in options:
            raise InputError(f"eta: got {eta:g} with sampler {name!r}, expected it once")
        options["eta"] = str(float(eta))
    return with_options(kind, key, sampler, options)


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
    guidance_phase: GuidancePhaseFn = lambda _: 0,
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
    if inpainting_mask is not None:
        denoise = inpainting_mask.within_steps(denoise)

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


# Step i draws with fold_in(key, i); the start is a step number that no grid reaches.
INITIAL_NOISE_STEP = 2**31 - 1
EXTRA_NOISE_STEP = 2**31 - 2  # the noise of an image beside the latents


def per_sample_keys(seeds: Sequence[int]) -> Key[Array, "b"]:
    """One key per image from its seed; seeds are below 2^32."""
    for seed in seeds:
        in_range("seed", seed, 0, 2**32 - 1)
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def step_noise(
    keys: Key[Array, "b"],
    step: int | Int[Array, ""] | Int[Array, "b"],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> Float[Array, "b *d"]:
    """Standard normal noise of `shape` for each image at its step."""

    def one(key: Key[Array, ""], step: Int[Array, ""]) -> Float[Array, "*d"]:
        return jax.random.normal(jax.random.fold_in(key, step), shape, dtype)

    return jax.vmap(one)(keys, jnp.broadcast_to(jnp.asarray(step), keys.shape))
