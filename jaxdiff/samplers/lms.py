"""LMS: a linear multistep method in the ratio sigma / alpha, with the last four noises."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Int
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState

_GAUSS = (0.5 - 0.75**0.5 / 3, 0.5 + 0.75**0.5 / 3)  # nodes on [0, 1], exact for cubics


class NoiseHistory(NamedTuple):
    """The noises of the three steps before, the last one first, with their ratios."""

    noises: tuple[Float[Array, "b *d"], Float[Array, "b *d"], Float[Array, "b *d"]]
    ratios: tuple[Float[Array, "b"], Float[Array, "b"], Float[Array, "b"]]
    num_steps: Int[Array, "b"]  # how many steps of finite ratio there were


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMS(Sampler):
    """Adams-Bashforth on unequal steps, up to four of them (k-diffusion).

    With r = sigma / alpha the ODE is d(x / alpha) / dr = eps. A step adds the integral from r to r'
    of the polynomial through the last noises, of Lagrange's weights: in u = (rho - r) / (r' - r)
    they are cubics on [0, 1], which two Gauss nodes integrate exactly. The first steps have fewer
    noises, and that from pure noise is Euler's.
    """

    order = 2
    rounding = 1e-5  # the sizes of four weights, up to ten times a step of uneven ones

    def init(self, x: Float[Array, "b *d"]) -> NoiseHistory:
        """No noises yet."""
        nothing, one = jnp.zeros_like(x), jnp.ones(len(x), x.dtype)
        zero = jnp.zeros(len(x), jnp.int32)
        return NoiseHistory((nothing, nothing, nothing), (one, one, one), zero)

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation."""
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        past = state.sampler_state
        begins = (here.alpha > 0).reshape(-1)  # not from pure noise
        r = (here.sigma / jnp.where(here.alpha > 0, here.alpha, 1)).reshape(-1)
        step = (there.sigma / there.alpha).reshape(-1) - r
        nodes = [jnp.zeros_like(r), *((ratio - r) / step for ratio in past.ratios)]
        known = [jnp.full_like(begins, True), *(past.num_steps > k for k in range(3))]
        x = there.alpha * D + there.sigma * eps
        for j, noise in enumerate(past.noises, 1):
            weight = jnp.where(known[j] & begins, step * _integral(nodes, known, j), 0)
            x = x + there.alpha * per_image(weight, x) * (noise - eps)
        history = NoiseHistory(
            (eps, *past.noises[:2]),
            (r, *past.ratios[:2]),
            past.num_steps + begins.astype(jnp.int32),
        )
        return SamplingState(x=x, x0=D, sampler_state=history, guidance_state=guidance_state)


def _integral(nodes: list[Float[Array, "b"]], known: list[Array], j: int) -> Float[Array, "b"]:
    """The integral over u in [0, 1] of Lagrange's polynomial that is 1 at node j."""
    total = jnp.zeros_like(nodes[0])
    for u in _GAUSS:
        product = jnp.ones_like(total)
        for k, node in enumerate(nodes):
            if k != j:
                apart = jnp.where(known[k] & known[j], nodes[j] - node, 1)
                product = product * jnp.where(known[k], (u - node) / apart, 1)
        total = total + product / 2
    return total
