"""DDIM: from the ODE (eta = 0) to ancestral sampling (eta = 1)."""

import dataclasses

import jax.numpy as jnp

from jaxdiff.core.validate import in_range
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState
from jaxdiff.samplers.steps import sigma_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """DDIM (2010.02502, eq. 12 and 16).

    The paper's noise c = eta (sigma'/sigma) sqrt(1 - alpha^2/alpha'^2) is eta sigma' sqrt(1 - q^2),
    so x' = alpha' D + sigma' (sqrt(1 - eta^2 (1 - q^2)) eps + eta sqrt(1 - q^2) z).
    """

    order = 1
    stochastic_options = ("eta",)
    renoises_along_eps = True

    eta: float = 0.0  # 0: deterministic; 1: DDPM

    def __post_init__(self) -> None:
        in_range("eta", self.eta, 0, 1)

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation; draws noise unless eta = 0."""
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        noise = eps
        if self.eta > 0:
            fresh = 1 - sigma_ratio(here, there) ** 2
            scale = jnp.sqrt(1 - self.eta**2 * fresh)
            noise = scale * eps + self.eta * jnp.sqrt(fresh) * noise_fn()
        x = there.alpha * D + there.sigma * noise
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)
