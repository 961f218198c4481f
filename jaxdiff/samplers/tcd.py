"""TCD: a network distilled to earlier points of the ODE, asked again from a noisier one."""

import dataclasses

import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range
from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCD(Sampler):
    """Strategic stochastic sampling of trajectory consistency distillation (2402.19159, alg. 4).

    DDIM's step goes to the earlier time s = (1 - eta) t', and noise brings it up again:
    x' = (alpha'/alpha_s) (alpha_s D + sigma_s eps) + sqrt(sigma'^2 - (alpha' sigma_s/alpha_s)^2) z.
    Without guidance in the network its scale is free. The times are some of the 50 that the network
    was distilled at.
    """

    stochastic = True
    renoises_along_eps = True
    internal = ("schedule",)

    eta: float = 0.3  # the paper's gamma. 0: deterministic; 1: multistep consistency sampling
    schedule: Schedule | None = None  # that of the network, set by `for_schedule`

    def __post_init__(self) -> None:
        in_range("eta", self.eta, 0, 1)

    def for_schedule(self, schedule: Schedule) -> Sampler:
        """The sampler that can ask `schedule` for the level of s."""
        return dataclasses.replace(self, schedule=schedule)

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation, one draw."""
        if self.schedule is None:
            raise InputError(
                "sampler: got TCD without a schedule, expected the sampler's for_schedule(schedule)"
            )
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        s = (1 - self.eta) * there.t
        if self.schedule.num_discrete is not None:
            s = jnp.floor(s)
        alpha, sigma = (per_image(a, D) for a in self.schedule.alpha_sigma(s))
        sigma_down = there.alpha * sigma / alpha
        sigma_up = jnp.sqrt(jnp.maximum(there.sigma**2 - sigma_down**2, 0))
        x = there.alpha * D + sigma_down * eps + sigma_up * noise_fn()
        return SamplingState(x=x, x0=D, sampler_state=(), guidance_state=guidance_state)
