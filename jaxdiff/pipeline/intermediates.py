"""Latents between the steps of the loop, as `Output.intermediates` has them."""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from jaxdiff.core.types import Float, Int, NDArray


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


class StepRecorder:
    """Keeps x and D of `steps` of the loop, where an image begins with step `first` of its own."""

    def __init__(self, steps: Collection[int], first: Int[NDArray, "b"]) -> None:
        # how many steps of its own an image has made where an intermediate step starts
        self._offsets = [step - first for step in steps]
        self._starts = {int(k) for offset in self._offsets for k in offset}
        self._recorded: dict[int, list[NDArray]] = {}

    def next_stop(self, done: int, stop: int, x: Callable[[], NDArray]) -> int:
        """Where the loop, which would stop at `stop`, stops; keeps `x` where a step starts."""
        if done in self._starts:
            self._recorded[done] = [x()]
        ends = {*self._starts, *(k + 1 for k in self._starts)}
        return min(stop, *(end for end in ends if end > done), stop)

    def after(self, done: int, x0: Callable[[], NDArray]) -> None:
        """Keeps `x0` of the step that started at `done`, if it is one of them."""
        if done in self._starts:
            self._recorded[done].append(x0())

    def pairs(self) -> list[tuple[Float[NDArray, "b *d"], Float[NDArray, "b *d"]]]:
        """x and D of each of the steps."""

        def at(offset: Int[NDArray, "b"], part: int) -> Float[NDArray, "b *d"]:
            return np.stack([self._recorded[int(k)][part][i] for i, k in enumerate(offset)])

        return [(at(offset, 0), at(offset, 1)) for offset in self._offsets]


_NOTHING = np.zeros((0, 0, 1, 1, 1), np.float32)
NO_INTERMEDIATES = Intermediates(
    steps=(), alpha=_NOTHING[..., 0, 0, 0], sigma=_NOTHING[..., 0, 0, 0], x=_NOTHING, x0=_NOTHING
)
