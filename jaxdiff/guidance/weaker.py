"""Guidance away from a weaker model: a second network, or the same with its attention disturbed."""

import dataclasses
from collections.abc import Sequence

from jaxdiff.core.types import Array, PyTree
from jaxdiff.diffusion.predictions import Prediction
from jaxdiff.guidance.classifier_free import Conditional, Outputs
from jaxdiff.guidance.rule import Dials, Guidance, Number, Query, Stream, check, extrapolate, rule


@rule
class Autoguidance(Guidance):
    """Autoguidance (2406.02507, eq. 4): g = weak + w (main - weak), both given the same prompt.

    The weaker network is a smaller or less trained one with the same kind of mistakes.
    """

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The prompt, read by either network."""
        return Stream(network="guide"), Stream()

    @property
    def plain(self) -> int:
        """The main network's stream."""
        return 1

    def combine(
        self, outputs: Outputs, query: Query, dials: Dials, memory: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The prediction extrapolated from the weaker network through the main one."""
        return query.predict(extrapolate(*self.ends(outputs, dials), dials.scale)), memory

    def cheapest(self, scales: Sequence[float]) -> Guidance:
        """At w = 1 the weaker network is not run."""
        return Conditional() if all(w == 1 for w in scales) else self


@rule
class PerturbedAttention(Guidance):
    """PAG (2403.17377, eq. 14) beside classifier-free guidance.

    g = uncond + w (cond - uncond) + k (cond - perturbed), where in the perturbed stream every pixel
    attends only to itself in the middle of the network. At w = 1 there is no null stream.
    """

    k: Number = 3.0
    null: bool = True

    def __post_init__(self) -> None:
        check("k", self.k, 0, 1000)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Null unless there is none, the prompt, the prompt perturbed."""
        prompt = (Stream(), Stream(perturbed=True))
        return (Stream("negative"), *prompt) if self.null else prompt

    @property
    def plain(self) -> int:
        """The stream of the prompt."""
        return int(self.null)

    def ends(self, outputs: Outputs, dials: Dials) -> tuple[Array, Array]:
        """The null stream, or the perturbed one in its place, and that of the prompt."""
        return outputs[0 if self.null else -1], outputs[self.plain]

    def combine(
        self, outputs: Outputs, query: Query, dials: Dials, memory: PyTree
    ) -> tuple[Prediction, PyTree]:
        """Classifier-free guidance, moved away from the perturbed stream."""
        uncond, cond = self.ends(outputs, dials)
        away = self.k * (cond - outputs[-1])
        return query.predict(extrapolate(uncond, cond, dials.scale) + away), memory

    def cheapest(self, scales: Sequence[float]) -> Guidance:
        """At w = 1 without the null stream."""
        return dataclasses.replace(self, null=not all(w == 1 for w in scales))
