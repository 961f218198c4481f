"""Classifier-free guidance (2207.12598): between two streams, and with a third, negative one.

Its scale w says how far to go from the null stream: w = 0 is unconditional and w = 1 the plain
conditional model. (The paper's weight is w - 1.) All weights of these rules sum to 1 and the kinds
of prediction are affine in one another, so combining raw outputs is combining scores.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.predictions import Prediction, per_image
from jaxdiff.guidance.rule import Dials, Guidance, Query, Stream, extrapolate, rule

Outputs = tuple[Float[Array, "b *d"], ...]


@rule
class Conditional(Guidance):
    """No guidance: one stream, the conditional model as it is. Ignores the scale."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The prompt."""
        return (Stream(),)

    @property
    def plain(self) -> int:
        """The only stream."""
        return 0

    def combine(
        self, outputs: Outputs, query: Query, dials: Dials, memory: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The prediction of the only stream."""
        return query.predict(outputs[0]), memory


@rule
class TwoStreams(Guidance):
    """Rules between a null stream, or that of a negative prompt, and a conditional one.

    Several `prompts` of an image make one conditional stream, uncond + sum_i w_i (cond_i - uncond)
    (composable diffusion, 2206.01714, eq. 11; a prompt with negative w_i is a NOT). That is the
    score of a product of densities at the last noise level, and near it at the others.
    """

    prompts: int = 1

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Null, then the prompts."""
        return Stream("negative"), *(Stream(part=i) for i in range(self.prompts))

    @property
    def plain(self) -> int | None:
        """The stream of the prompt, if there is one."""
        return 1 if self.prompts == 1 else None

    def ends(self, outputs: Outputs, dials: Dials) -> tuple[Array, Array]:
        """The null stream, and the conditional one that the prompts make together."""
        uncond, *conds = outputs[: 1 + self.prompts]
        if dials.weights is None and len(conds) == 1:
            return uncond, conds[0]
        weights = dials.weights
        if weights is None:
            weights = jnp.ones((len(uncond), self.prompts), uncond.dtype)
        steps = [per_image(weights[:, i], c) * (c - uncond) for i, c in enumerate(conds)]
        return uncond, uncond + sum(steps)

    def composed(self, prompts: int) -> Guidance:
        """The same rule for so many prompts."""
        return dataclasses.replace(self, prompts=prompts)


@rule
class ClassifierFree(TwoStreams):
    """g = uncond + w (cond - uncond) (2207.12598, eq. 6, in the form of Imagen)."""

    def combine(
        self, outputs: Outputs, query: Query, dials: Dials, memory: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The prediction extrapolated from the null stream through the conditional one."""
        return query.predict(extrapolate(*self.ends(outputs, dials), dials.scale)), memory

    def cheapest(self, scales: Sequence[float]) -> Guidance:
        """At w = 1 no null stream is run."""
        one = self.prompts == 1 and all(w == 1 for w in scales)
        return Conditional() if one else self


@rule
class ThreeStreams(Guidance):
    """g = null + w (cond - null) - wn (negative - null): the negative prompt has its own weight.

    Without `dials.negative` wn is w, so that g = null + w (cond - negative). With wn = w - 1 it is
    classifier-free guidance away from the negative prompt. A `perpendicular` negative is rid of
    its component along cond - null first, so that it cannot undo the prompt (2304.04968, eq. 8).
    """

    perpendicular: bool = False

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Null, the prompt, the negative prompt."""
        return Stream("null"), Stream("prompt"), Stream("negative")

    @property
    def plain(self) -> int:
        """The stream of the prompt."""
        return 1

    def combine(
        self, outputs: Outputs, query: Query, dials: Dials, memory: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The null stream, moved towards the prompt and away from the negative prompt."""
        null, cond, negative = outputs
        towards, away = cond - null, negative - null
        if self.perpendicular:
            away = away - along(away, towards)
        wn = dials.scale if dials.negative is None else dials.negative
        g = null + per_image(dials.scale, null) * towards - per_image(wn, null) * away
        return query.predict(g), memory


def along(a: Float[Array, "b *d"], b: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """The component of a along b, image by image; zero where b is zero."""
    axes = tuple(range(1, a.ndim))
    square = jnp.sum(b * b, axes, keepdims=True)
    share = jnp.sum(a * b, axes, keepdims=True) / jnp.where(square == 0, 1, square)
    return jnp.where(square == 0, 0, share) * b
