"""LCM: a network distilled to the end of the ODE, asked again from fresh noise."""

import dataclasses

from jaxdiff.diffusion.denoising import Denoiser, NoiseLevel, per_image
from jaxdiff.samplers.base import NoiseFn, Sampler, SamplingState


@dataclasses.dataclass(frozen=True, kw_only=True)
class LCM(Sampler):
    """Multistep consistency sampling (2303.01469, algorithm 1) as LCM does it (2310.04378).

    The consistency function f = c_skip x + c_out D is x itself at t = 0: with u = 10 t,
    c_skip = .25 / (u^2 + .25) and c_out = u / sqrt(u^2 + .25). Then x' = alpha' f + sigma' z.
    Guidance was distilled into the network too: its scale is 1. The times are some of the 50 that
    the network was distilled at.
    """

    stochastic = True

    def step(
        self,
        denoise: Denoiser,
        state: SamplingState,
        here: NoiseLevel,
        there: NoiseLevel,
        noise_fn: NoiseFn,
    ) -> SamplingState:
        """One evaluation, one draw."""
        (D, _), guidance_state = denoise(state.x, here, state.guidance_state)
        u = 10 * per_image(here.t, D)
        scale = u**2 + 0.25
        f = 0.25 / scale * state.x + u * scale**-0.5 * D
        x = there.alpha * f + there.sigma * noise_fn()
        return SamplingState(x=x, x0=f, sampler_state=(), guidance_state=guidance_state)
