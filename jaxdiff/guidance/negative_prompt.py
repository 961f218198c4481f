"""Guidance away from a negative prompt with a weight of its own."""

from jaxdiff.core.types import PyTree
from jaxdiff.diffusion.denoising import Prediction, per_image
from jaxdiff.guidance.base import (
    Capabilities,
    DenoiserInput,
    Guidance,
    GuidanceScales,
    Outputs,
    Stream,
)
from jaxdiff.guidance.projection import project_onto
from jaxdiff.guidance.rule import rule


@rule
class NegativePromptGuidance(Guidance):
    """g = null + w (cond - null) - wn (negative - null): the negative prompt has its own weight.

    Without `scales.negative` wn is w, so that g = null + w (cond - negative). With wn = w - 1 it is
    classifier-free guidance away from the negative prompt. A `perpendicular` negative is rid of
    its component along cond - null first, so that it cannot undo the prompt (2304.04968, eq. 8).
    """

    perpendicular: bool = False

    @property
    def capabilities(self) -> Capabilities:
        """A scale of the negative prompt."""
        return Capabilities(negative_scale=True)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Null, the prompt, the negative prompt."""
        return Stream("null"), Stream("prompt"), Stream("negative")

    @property
    def cond_stream(self) -> int:
        """The stream of the prompt."""
        return 1

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The null stream, moved towards the prompt and away from the negative prompt."""
        null, cond, negative = outputs
        towards, away = cond - null, negative - null
        if self.perpendicular:
            away = away - project_onto(away, towards)
        wn = scales.scale if scales.negative is None else scales.negative
        g = null + per_image(scales.scale, null) * towards - per_image(wn, null) * away
        return inputs.predict(g), state
