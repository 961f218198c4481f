"""Latents between the steps of the loop, as `Output.intermediates` has them."""

import dataclasses

import numpy as np

from jaxdiff.core.types import Float, NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intermediates:
    """Steps of the loop: the noise level from which each starts, and the latents there.

    `x0` is the guided image D that the step finds in the noisy `x` = alpha x0 + sigma eps. Images
    with grids of their own have levels of their own, then alpha and sigma are (n, b).
    """

    steps: tuple[int, ...]  # from 0
    alpha: Float[NDArray, "n *b"]
    sigma: Float[NDArray, "n *b"]
    x: Float[NDArray, "n b *d"]
    x0: Float[NDArray, "n b *d"]

    @property
    def unit_variance(self) -> Float[NDArray, "n b *d"]:
        """`x` / sqrt(alpha^2 + sigma^2): latents of unit variance have that spread at any level."""
        spread = np.hypot(self.alpha, self.sigma)
        return self.x / spread.reshape(len(spread), -1, *(1,) * (self.x.ndim - 2))


_NOTHING = np.zeros((0, 0, 1, 1, 1), np.float32)
NO_INTERMEDIATES = Intermediates(
    steps=(), alpha=_NOTHING[..., 0, 0, 0], sigma=_NOTHING[..., 0, 0, 0], x=_NOTHING, x0=_NOTHING
)
