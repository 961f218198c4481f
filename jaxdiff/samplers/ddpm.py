"""DDPM: ancestral sampling from the posterior of the forward process."""

import dataclasses

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.predictions import Denoiser
from jaxdiff.diffusion.timesteps import Convention, Level
from jaxdiff.samplers.rule import Carry, Draw, decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM:
    """Ancestral sampling (2006.11239, eq. 6 and 7) with the smaller variance, beta~.

    The posterior of x' given x and x0 = D is N(alpha' (1 - q^2) D + (sigma'/sigma) q x,
    sigma'^2 (1 - q^2)); the last step has sigma' = 0 and adds nothing. Latents are never clipped.
    """

    convention: Convention = dataclasses.field(default=Convention(), init=False)

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """No history."""
        return ()

    def step(self, denoise: Denoiser, carry: Carry, here: Level, there: Level, draw: Draw) -> Carry:
        """One evaluation, one draw."""
        (D, _), memory = denoise(carry.x, here, carry.memory)
        q = decay(here, there)
        mean = there.alpha * (1 - q**2) * D + (there.sigma / here.sigma) * q * carry.x
        x = mean + there.sigma * jnp.sqrt(1 - q**2) * draw()
        return Carry(x=x, x0=D, history=(), memory=memory)
