"""The guidance scale over the steps: in an interval, until the streams agree, or on a curve."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff.core.types import Array, Bool, Float, Int, PyTree
from jaxdiff.core.validate import one_of
from jaxdiff.diffusion.denoising import NoiseLevel, Prediction
from jaxdiff.guidance.base import (
    CONDITIONAL,
    DenoiserInput,
    GuidanceScales,
    Number,
    Outputs,
    check,
)
from jaxdiff.guidance.rule import rule
from jaxdiff.guidance.wrapper import Wrapper


@rule
class GuidanceInterval(Wrapper):
    """Guidance in a limited interval (2404.07724, eq. 5): where lo < sigma / alpha <= hi.

    Elsewhere only the conditional stream is run, so these steps cost one evaluation. A step is
    inside or outside as a whole, by the level from which it starts.
    """

    simplify = Wrapper.simplify_or_drop
    keeps_separate_eps = True

    lo: Number = 0.0
    hi: Number = float("inf")

    def __post_init__(self) -> None:
        check("lo", self.lo, 0, float("inf"))
        check("hi", self.hi, self.lo if isinstance(self.lo, int | float) else 0, float("inf"))

    def mode(self, level: NoiseLevel, state: PyTree) -> int | Int[Array, "b"]:
        """Inside that of the wrapped rule, outside the conditional stream at most."""
        return _guided_where(self._inside(level), self.inner.mode(level, state))

    def phase(self, level: NoiseLevel) -> int | Int[Array, "b"]:
        """That of the wrapped rule inside and outside."""
        return 2 * self.inner.phase(level) + jnp.int32(self._inside(level))

    def _inside(self, level: NoiseLevel) -> Bool[Array, "b"]:
        return jnp.logical_and(self.lo < level.step_start_sigma, level.step_start_sigma <= self.hi)


@rule
class AdaptiveGuidance(Wrapper):
    """Adaptive guidance (2312.12487, section 5): from the step on at which the streams agree,
    the conditional model alone.

    They agree where the cosine between the noise of the two ends reaches `cosine`. Each image
    decides for itself, independent of its batch; evaluations are saved once all agree.
    """

    simplify = Wrapper.simplify_or_drop
    keeps_separate_eps = True

    cosine: Number = 0.99

    def __post_init__(self) -> None:
        check("cosine", self.cosine, -1, 2)

    def init_state(self, x: Float[Array, "b *d"]) -> PyTree:
        """The wrapped rule's state, and which images are done with guidance."""
        return self.inner.init_state(x), jnp.zeros(len(x), bool)

    def mode(self, level: NoiseLevel, state: PyTree) -> int | Int[Array, "b"]:
        """That of the wrapped rule until an image is done."""
        inner, done = state
        return _guided_where(~done, self.inner.mode(level, inner))

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The wrapped rule's prediction, and whether the streams agree now."""
        inner, done = state
        prediction, inner = self.inner.combine(outputs, inputs, scales, inner)
        uncond, cond = self.uncond_and_cond(outputs, scales)
        eps, away = (inputs.predict(end).eps.reshape(len(done), -1) for end in (cond, uncond))
        lengths = jnp.sqrt(jnp.sum(eps**2, 1) * jnp.sum(away**2, 1))
        cosine = jnp.sum(eps * away, 1) / jnp.where(lengths == 0, 1, lengths)
        return prediction, (inner, done | (cosine >= self.cosine))


def _guided_where(guides: Bool[Array, "b"], mode: int | Int[Array, "#b"]) -> Int[Array, "b"]:
    """`mode` where the rule guides, elsewhere at most the conditional stream."""
    return jnp.where(guides, mode, jnp.minimum(mode, CONDITIONAL))


# The factor of w - 1 at the share u of the steps that are gone, 0 <= u < 1; its mean is 1.
SCALE_CURVES: dict[str, Callable[[Array], Array]] = {
    "constant": jnp.ones_like,
    "linear": lambda u: 2 * u,
    "falling": lambda u: 2 - 2 * u,
    "cosine": lambda u: 1 - jnp.cos(jnp.pi * u),
    "peak": lambda u: 1 - jnp.cos(2 * jnp.pi * u),
}


@rule
class ScaleSchedule(Wrapper):
    """A scale that changes on the way: 1 + (w - 1) f(u) at the share u of the steps (2404.13040).

    Below w = 1, where that would be negative, it is 0.
    `curve` names f: linear and cosine rise, falling falls, peak does both.
    """

    simplify = Wrapper.simplify_or_drop

    curve: str = "linear"

    def __post_init__(self) -> None:
        one_of("guidance: curve", self.curve, SCALE_CURVES)

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The wrapped rule's prediction with the scale of this step."""
        level = inputs.level
        progress = jnp.asarray(level.step, jnp.float32) / jnp.asarray(level.num_steps, jnp.float32)
        factor = SCALE_CURVES[self.curve](progress).astype(scales.scale.dtype)
        now = scales._replace(scale=jnp.maximum(1 + (scales.scale - 1) * factor, 0))
        return self.inner.combine(outputs, inputs, now, state)
