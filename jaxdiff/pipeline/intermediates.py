"""Intermediate latents at chosen steps of the sampling loop."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxdiff.core.types import Float, NDArray
from jaxdiff.diffusion.timesteps import TimestepGrid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intermediates:
    """Steps of the loop: the noise level from which each starts, and the latents there.

    `x0` is the guided image D that the step finds in the noisy `x` = alpha x0 + sigma eps. Images
    with grids of their own have levels of their own, then alpha and sigma are (n, b).
    """

    steps: tuple[int, ...]  # from 0
    alpha: Float[NDArray, "n *b"]
    sigma: Float[NDArray, "n *b"]
    x: Float[NDArray, "n b h w c"]
    x0: Float[NDArray, "n b h w c"]

    @classmethod
    def of(
        cls, steps: Sequence[int], grid: TimestepGrid, pairs: Float[NDArray, "b n 2 h w c"]
    ) -> "Intermediates":
        """The steps of the images' grids, from (x, x0) of each image and step."""
        tables = (np.asarray(table)[:, list(steps)].T for table in (grid.alpha, grid.sigma))
        alpha, sigma = (table[:, 0] if np.all(table == table[:, :1]) else table for table in tables)
        x, x0 = (np.moveaxis(pairs[:, :, k], 0, 1) for k in (0, 1))
        return cls(steps=tuple(steps), alpha=alpha, sigma=sigma, x=x, x0=x0)

    @property
    def unit_variance(self) -> Float[NDArray, "n b h w c"]:
        """`x` / sqrt(alpha^2 + sigma^2): latents of unit variance have that spread at any level."""
        spread = np.hypot(self.alpha, self.sigma)
        return self.x / spread.reshape(len(spread), -1, 1, 1, 1)
