"""CFG-Zero*: a null stream scaled to fit the conditional one, and zero velocity in first steps."""

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Int, PyTree
from jaxdiff.diffusion.denoising import NoiseLevel, Prediction
from jaxdiff.guidance.base import (
    GUIDED,
    SKIP,
    DenoiserInput,
    GuidanceScales,
    Outputs,
    check,
    extrapolate,
)
from jaxdiff.guidance.classifier_free import CondUncond
from jaxdiff.guidance.rule import rule


@rule
class CFGZeroStar(CondUncond):
    """CFG-Zero* (2503.18886, algorithm 1), on the velocities v = eps - D.

    v = k v_uncond + w (v_cond - k v_uncond), with k v_uncond the component of v_cond along
    v_uncond. In the first `zero_steps` steps v is 0. Any path is that of a flow once it is divided
    by alpha + sigma, so the velocity of other networks means the same. At w = 0 it is k v_uncond.
    The first steps need no network, and change x / (alpha + sigma) by nothing, at w = 1 too.
    """

    zero_steps: int = 1

    def __post_init__(self) -> None:
        check("zero_steps", self.zero_steps, 0, 1000)

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The prediction that means the combined velocity."""
        uncond, cond = (
            _velocity(inputs.predict(end)) for end in self.uncond_and_cond(outputs, scales)
        )
        axes = tuple(range(1, cond.ndim))
        dot, square = (jnp.sum(a * uncond, axes, keepdims=True) for a in (cond, uncond))
        v = extrapolate(dot / (square + 1e-8) * uncond, cond, scales.scale)
        return inputs.predict(v, "flow_prediction"), state

    def mode(self, level: NoiseLevel, state: PyTree) -> Int[Array, "b"]:
        """The first steps have zero velocity."""
        return jnp.where(level.step < self.zero_steps, SKIP, GUIDED)

    def phase(self, level: NoiseLevel) -> Int[Array, "b"]:
        """0 in the first steps, then 1."""
        return jnp.int32(level.step >= self.zero_steps)


def _velocity(prediction: Prediction) -> Float[Array, "b *d"]:
    return prediction.eps - prediction.x0
