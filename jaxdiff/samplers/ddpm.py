"""DDPM: ancestral sampling from the posterior of the forward process."""

import dataclasses
from collections.abc import Callable
from typing import cast

import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import one_of
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import sigma_ratio

LEARNED = ("learned_range", "learned")
VARIANCES = ("fixed_small", "fixed_large", *LEARNED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling (2006.11239, eq. 6 and 7).

    The posterior of x' given x and x0 = D is N(alpha' (1 - q^2) D + (sigma'/sigma) q x, v) with
    v = sigma'^2 (1 - q^2), their beta~, the variance "fixed_small". "fixed_large" is their beta,
    1 - (alpha/alpha')^2 = sigma^2 (1 - q^2), which is right where the data are noise themselves.
    Between them, with the network's output f from -1 to 1, is "learned_range", log v =
    (1 + f)/2 log beta + (1 - f)/2 log beta~ (Improved DDPM, 2102.09672, eq. 15), and "learned" is
    an output v itself; neither is bounded. A step to a clean image adds nothing. Latents are never
    clipped.

    Classifier guidance moves the mean by v `score` (2105.05233, algorithm 1), with beta~ as v
    unless v is learned.
    """

    order = 1
    stochastic = True
    internal = ("score",)

    variance: str = "fixed_small"  # a name in VARIANCES; those in LEARNED need a network's
    # k grad log p(y | x) at the noisy image from which a step begins
    score: Callable[[Array, NoiseLevel], Array] | None = None

    def __post_init__(self) -> None:
        one_of("variance", self.variance, VARIANCES)

    @property
    def reads_variance(self) -> bool:
        """Where it is learned."""
        return self.variance in LEARNED

    def check_variance(self, *, learned: bool) -> None:
        """Networks without one have the fixed variances."""
        if self.reads_variance and not learned:
            raise InputError(
                f"variance: got {self.variance} for a network that learns no variance, expected "
                "fixed_small or fixed_large"
            )

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
        """One evaluation, one draw; one gradient with a score.

        InputError for a denoiser without the variance that the sampler reads.
        """
        prediction, guidance_state = denoise(state.x, here, state.guidance_state)
        q, D = sigma_ratio(here, there), prediction.x0
        mean = there.alpha * (1 - q**2) * D + (there.sigma / here.sigma) * q * state.x
        small, large = (sigma * jnp.sqrt(1 - q**2) for sigma in (there.sigma, here.sigma))
        deviation = small if self.variance != "fixed_large" else large
        if self.reads_variance:
            deviation = self._learned(prediction.variance, small, large)
        deviation = jnp.where(there.sigma > 0, deviation, 0)
        x = mean + deviation * noise_fn()
        if self.score is not None:
            variance = (deviation if self.reads_variance else small) ** 2
            x = x + variance * self.score(state.x, here)
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)

    def _learned(
        self, output: Float[Array, "b *d"] | None, small: Array, large: Array
    ) -> Float[Array, "b *d"]:
        """The standard deviation that an output means, between those of beta~ and beta."""
        self.check_variance(learned=output is not None)
        output = cast(Array, output)
        if self.variance == "learned":
            return jnp.sqrt(output)
        f = (1 + output) / 2
        # Where the step ends at a clean image there is no logarithm, nor any noise.
        log_small, log_large = (jnp.log(jnp.where(a > 0, a, 1)) for a in (small, large))
        return jnp.exp((1 - f) * log_small + f * log_large)
