"""The SDE of a flow with noise of a free size, from the probability-flow ODE (k = 0) upwards."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff.core.types import Array
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import sigma_ratio

# By the name of g^2: the integral of g^2 / (2 k s^2) over a step.
DIFFUSIONS: dict[str, Callable[[NoiseLevel, NoiseLevel], Array]] = {
    # g^2 = 2 k s
    "sigma": lambda here, there: jnp.log(_noise(here) / _noise(there)),
    # g^2 = 2 k s / (1 - s), at k = 1 the time reversal of the forward process
    "reverse": lambda here, there: -jnp.log(sigma_ratio(here, there)),
    # g^2 = 2 k s^2
    "quadratic": lambda here, there: _noise(here) - _noise(there),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSDE(Sampler):
    """dX = [u + g^2 / 2 S] dtau + g dW, which has the marginals of the ODE dX = u dtau for any g.

    (SiT, 2401.08740; MIT 6.S184.) Time tau = 1 - s goes to the data, u is the velocity D - eps
    and S = -eps / s the score of the linear path. Any other path is that one once it is divided by
    alpha + sigma, with s = sigma / (alpha + sigma). Between two levels D is constant, which makes X
    linear, and the step exact:
    X' = (1 - s') D + s' (e eps + sqrt(1 - e^2) z), e = exp(-integral of g^2 / (2 s^2)).
    Guided, u and S are those of the guided prediction. S is no longer the score of the marginals
    then, which depend on g.
    """

    order = 1
    stochastic = True
    renoises_along_eps = True

    k: float = 1.0  # the size of the noise; 0: the ODE
    diffusion: str = "sigma"  # how g^2 changes with the noise level: a name in DIFFUSIONS

    def __post_init__(self) -> None:
        in_range("k", self.k, 0, 1e3)
        one_of("diffusion", self.diffusion, DIFFUSIONS)

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation, one draw; none at k = 0."""
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        if self.k:
            decay = self.k * DIFFUSIONS[self.diffusion](here, there)
            eps = jnp.exp(-decay) * eps + jnp.sqrt(-jnp.expm1(-2 * decay)) * noise_fn()
        x = there.alpha * D + there.sigma * eps
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)


def _noise(level: NoiseLevel) -> Array:
    """s of the linear path."""
    return level.sigma / (level.alpha + level.sigma)
