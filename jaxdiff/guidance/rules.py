"""Guidance rules: frozen choices that say how many streams they need and how these combine.

A rule sees the raw outputs of the network, since some are defined in that space. It gives a
prediction, so it may convert first and combine denoised images, and it may return a `Prediction`
whose noise belongs to another stream than its image. What differs between images or runs (scales)
is traced and comes in as `parameters`; what lasts from step to step (momentum) is its `memory`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.predictions import Prediction, per_image, predict
from jaxdiff.diffusion.timesteps import Level


class Query(NamedTuple):
    """What the network was asked: noisy images, their noise level, the kind of its predictions."""

    x: Float[Array, "b *d"]
    level: Level
    kind: str

    def predict(self, output: Float[Array, "b *d"]) -> Prediction:
        """The image and the noise that `output` means."""
        return predict(self.kind, output, self.x, self.level.alpha, self.level.sigma)


@runtime_checkable
class Guidance(Protocol):
    """A guidance rule."""

    @property
    def streams(self) -> int:
        """K, the number of conditions that each image is denoised under."""
        ...

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """The memory before the first step."""
        ...

    def combine(
        self,
        outputs: tuple[Float[Array, "b *d"], ...],
        query: Query,
        parameters: PyTree,
        memory: PyTree,
    ) -> tuple[Prediction, PyTree]:
        """One prediction from the K outputs of the streams, and the new memory."""
        ...


def combine(
    uncond: Float[Array, "b *d"], cond: Float[Array, "b *d"], w: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """g = uncond + w (cond - uncond), the scale w per image.

    Classifier-free guidance (2207.12598, eq. 6, whose weight is w - 1; the form is Imagen's).
    """
    return uncond + per_image(w, cond) * (cond - uncond)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditional:
    """No guidance: one stream, the conditional model as it is. Ignores the scale."""

    streams: int = dataclasses.field(default=1, init=False)

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """No memory."""
        return ()

    def combine(
        self,
        outputs: tuple[Float[Array, "b *d"], ...],
        query: Query,
        parameters: PyTree,
        memory: PyTree,
    ) -> tuple[Prediction, PyTree]:
        """The prediction of the only stream."""
        (cond,) = outputs
        return query.predict(cond), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """Classifier-free guidance: streams (null, conditional), `parameters` the scales w, (b,).

    A negative prompt is another embedding in the null stream. The weights of the streams sum to 1
    and the kinds of prediction are affine in one another, so combining raw outputs is combining
    scores, whatever the kind.
    """

    streams: int = dataclasses.field(default=2, init=False)

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """No memory."""
        return ()

    def combine(
        self,
        outputs: tuple[Float[Array, "b *d"], ...],
        query: Query,
        parameters: Float[Array, "b"],
        memory: PyTree,
    ) -> tuple[Prediction, PyTree]:
        """The prediction extrapolated from the null stream through the conditional one."""
        uncond, cond = outputs
        return query.predict(combine(uncond, cond, parameters)), memory


RULES: dict[str, Guidance] = {"none": Conditional(), "cfg": ClassifierFree()}


def rule_for(scales: Sequence[float]) -> Guidance:
    """The cheapest rule that guides images with these scales: at w = 1 no null stream is run."""
    return RULES["none" if all(w == 1 for w in scales) else "cfg"]
