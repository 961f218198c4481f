"""Adaptive projected guidance: less of the part of guidance that only raises contrast."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.denoising import Prediction, per_image
from jaxdiff.guidance.base import (
    DenoiserInput,
    Guidance,
    GuidanceScales,
    Number,
    Outputs,
    check,
)
from jaxdiff.guidance.classifier_free import CondUncond
from jaxdiff.guidance.no_guidance import NoGuidance
from jaxdiff.guidance.projection import project_onto
from jaxdiff.guidance.rule import rule


@rule
class APG(CondUncond):
    """APG (2410.02416, algorithm 1), on denoised images.

    d = D_cond - D_uncond becomes m = d + momentum m_before, is limited to length `norm_threshold`,
    and is split into a part along D_cond, kept by `eta`, and the rest: D = D_cond + (w - 1) (rest +
    eta part). With eta = 1, no limit and no momentum it is classifier-free guidance. The length
    grows as the square root of the number of values in an image.
    """

    eta: Number = 0.0
    norm_threshold: Number = float("inf")
    momentum: Number = 0.0  # below 0, as in the paper, it damps what steps have in common

    def __post_init__(self) -> None:
        check("eta", self.eta, 0, 10)
        check("norm_threshold", self.norm_threshold, 0, float("inf"))
        check("momentum", self.momentum, -1, 1)

    def init_state(self, x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
        """m = 0."""
        return jnp.zeros_like(x)

    def combine(
        self,
        outputs: Outputs,
        inputs: DenoiserInput,
        scales: GuidanceScales,
        state: Float[Array, "b *d"],
    ) -> tuple[Prediction, PyTree]:
        """The conditional image and the projected guidance."""
        uncond, cond = (inputs.predict(end).x0 for end in self.uncond_and_cond(outputs, scales))
        moved = cond - uncond + self.momentum * state
        axes = tuple(range(1, moved.ndim))
        length = jnp.sqrt(jnp.sum(moved * moved, axes, keepdims=True))
        shrunk = moved * jnp.minimum(1, self.norm_threshold / jnp.where(length == 0, 1, length))
        part = project_onto(shrunk, cond)
        step = shrunk - part + self.eta * part
        return inputs.denoised(cond + per_image(scales.scale - 1, cond) * step), moved

    def simplify(self, scales: Sequence[float]) -> Guidance:
        """At w = 1 it is the conditional model."""
        one = self.num_prompts == 1 and all(w == 1 for w in scales)
        return NoGuidance() if one else self
