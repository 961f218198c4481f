"""The interface of wrappers: changes to any rule."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from jaxdiff.core.types import Array, Float, Int, PyTree
from jaxdiff.diffusion.denoising import NoiseLevel, Prediction
from jaxdiff.guidance.base import (
    Capabilities,
    DenoiserInput,
    Guidance,
    GuidanceScales,
    Outputs,
    Stream,
)
from jaxdiff.guidance.rule import rule


@rule
class Wrapper(Guidance):
    """A rule that changes another one, `inner`, in one respect and delegates the rest to it.

    It may read any stream and change the scales, so `simplify` keeps all streams by default.
    """

    internal = ("inner",)
    keeps_separate_eps: ClassVar[bool] = False  # whether it can wrap a rule with `separate_eps`

    inner: Guidance

    @property
    def capabilities(self) -> Capabilities:
        """Those of the wrapped rule."""
        return self.inner.capabilities

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Those of the wrapped rule."""
        return self.inner.streams

    @property
    def cond_stream(self) -> int | None:
        """That of the wrapped rule."""
        return self.inner.cond_stream

    def uncond_and_cond(
        self, outputs: Outputs, scales: GuidanceScales
    ) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
        """Those of the wrapped rule."""
        return self.inner.uncond_and_cond(outputs, scales)

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The prediction of the wrapped rule."""
        return self.inner.combine(outputs, inputs, scales, state)

    def init_state(self, x: Float[Array, "b *d"]) -> PyTree:
        """That of the wrapped rule."""
        return self.inner.init_state(x)

    def mode(self, level: NoiseLevel, state: PyTree) -> int | Int[Array, "b"]:
        """As the wrapped rule."""
        return self.inner.mode(level, state)

    def phase(self, level: NoiseLevel) -> int | Int[Array, "b"]:
        """As the wrapped rule."""
        return self.inner.phase(level)

    def unguided(self, cond: Float[Array, "b *d"], inputs: DenoiserInput) -> Prediction:
        """As the wrapped rule."""
        return self.inner.unguided(cond, inputs)

    def skipped(self, inputs: DenoiserInput) -> Prediction:
        """As the wrapped rule."""
        return self.inner.skipped(inputs)

    def simplify_inner(self, scales: Sequence[float]) -> Guidance:
        """`simplify` of a change that depends on the wrapped rule's prediction alone."""
        return dataclasses.replace(self, inner=self.inner.simplify(scales))

    def simplify_or_drop(self, scales: Sequence[float]) -> Guidance:
        """`simplify` of a change of guidance, which leaves the conditional prediction as it is."""
        inner = self.inner.simplify(scales)
        return inner if len(inner.streams) == 1 else dataclasses.replace(self, inner=inner)

    def for_prompts(self, num_prompts: int) -> Guidance:
        """The same change to the wrapped rule for that many prompts."""
        return dataclasses.replace(self, inner=self.inner.for_prompts(num_prompts))
