"""Guidance away from a weaker model: a second network, or the same with its attention disturbed."""

import dataclasses
from collections.abc import Sequence

from jaxdiff.core.types import Array, PyTree
from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.guidance.base import (
    DenoiserInput,
    Guidance,
    GuidanceScales,
    Number,
    Outputs,
    Stream,
    check,
    extrapolate,
)
from jaxdiff.guidance.no_guidance import NoGuidance
from jaxdiff.guidance.rule import rule


@rule
class Autoguidance(Guidance):
    """Autoguidance (2406.02507, eq. 4): g = weak + w (main - weak), both given the same prompt.

    The weaker network is a smaller or less trained one with the same kind of mistakes.
    """

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The prompt, read by either network."""
        return Stream(network="guidance_model"), Stream()

    @property
    def cond_stream(self) -> int:
        """The main network's stream."""
        return 1

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The prediction extrapolated from the weaker network through the main one."""
        return inputs.predict(
            extrapolate(*self.uncond_and_cond(outputs, scales), scales.scale)
        ), state

    def simplify(self, scales: Sequence[float]) -> Guidance:
        """At w = 1 the weaker network is not run."""
        return NoGuidance() if all(w == 1 for w in scales) else self


@rule
class PerturbedAttention(Guidance):
    """PAG (2403.17377, eq. 14) beside classifier-free guidance.

    g = uncond + w (cond - uncond) + scale (cond - perturbed), where in the perturbed stream every
    pixel attends only to itself in the middle of the network. At w = 1 there is no null stream.
    """

    internal = ("null",)

    scale: Number = 3.0
    null: bool = True

    def __post_init__(self) -> None:
        check("scale", self.scale, 0, 1000)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Null unless there is none, the prompt, the prompt perturbed."""
        prompt = (Stream(), Stream(perturbed=True))
        return (Stream("negative"), *prompt) if self.null else prompt

    @property
    def cond_stream(self) -> int:
        """The stream of the prompt."""
        return int(self.null)

    def uncond_and_cond(self, outputs: Outputs, scales: GuidanceScales) -> tuple[Array, Array]:
        """The null stream, or the perturbed one in its place, and that of the prompt."""
        return outputs[0 if self.null else -1], outputs[self.cond_stream]

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """Classifier-free guidance, moved away from the perturbed stream."""
        uncond, cond = self.uncond_and_cond(outputs, scales)
        away = self.scale * (cond - outputs[-1])
        return inputs.predict(extrapolate(uncond, cond, scales.scale) + away), state

    def simplify(self, scales: Sequence[float]) -> Guidance:
        """At w = 1 without the null stream."""
        return dataclasses.replace(self, null=not all(w == 1 for w in scales))
