"""DDPM: ancestral sampling from the posterior of the forward process."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff.core.types import Array
from jaxdiff.core.validate import one_of
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState, sigma_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling (2006.11239, eq. 6 and 7).

    The posterior of x' given x and x0 = D is N(alpha' (1 - q^2) D + (sigma'/sigma) q x, v) with
    v = sigma'^2 (1 - q^2), their beta~. "fixed_large" adds their beta instead, 1 - (alpha/alpha')^2
    = sigma^2 (1 - q^2), which is right where the data are noise themselves. A step to a clean image
    adds nothing. Latents are never clipped.

    Classifier guidance moves the mean by v `score` (2105.05233, algorithm 1).
    """

    order = 1
    stochastic = True
    internal = ("score",)

    variance: str = "fixed_small"  # or "fixed_large"
    # k grad log p(y | x) at the noisy image from which a step begins
    score: Callable[[Array, NoiseLevel], Array] | None = None

    def __post_init__(self) -> None:
        one_of("variance", self.variance, ("fixed_small", "fixed_large"))

    def with_score(self, score: Callable[[Array, NoiseLevel], Array]) -> Sampler:
        """The mean moves."""
        return dataclasses.replace(self, score=score)

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation, one draw; one gradient with a score."""
        (D, _), guidance_state = denoise(state.x, here, state.guidance_state)
        q = sigma_ratio(here, there)
        mean = there.alpha * (1 - q**2) * D + (there.sigma / here.sigma) * q * state.x
        sigma = there.sigma
        if self.variance == "fixed_large":
            sigma = jnp.where(there.sigma > 0, here.sigma, 0)
        x = mean + sigma * jnp.sqrt(1 - q**2) * noise_fn()
        if self.score is not None:
            x = x + there.sigma**2 * (1 - q**2) * self.score(state.x, here)
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)
