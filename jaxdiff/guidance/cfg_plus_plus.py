"""CFG++: guidance in the denoised image only, which keeps the path on the data's manifold."""

from jaxdiff.core.types import PyTree
from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.guidance.base import (
    Capabilities,
    DenoiserInput,
    GuidanceScales,
    Outputs,
    extrapolate,
)
from jaxdiff.guidance.classifier_free import CondUncond
from jaxdiff.guidance.rule import rule


@rule
class CFGPlusPlus(CondUncond):
    """CFG++ (2406.08070, algorithm 1): the image of the guided stream, the noise of the null one.

    Its scale, written lambda in the paper, goes from 0, which is unconditional, to 1. On the ODE a
    step from sigma r to r' is that of classifier-free guidance with w = scale r / (r - r'). Only
    samplers that add noise back along `Prediction.eps` can follow it.
    """

    @property
    def capabilities(self) -> Capabilities:
        """Scales up to 1, and its own noise."""
        return Capabilities(max_scale=1, separate_eps=True)

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The guided image and the noise of the null stream."""
        uncond, cond = self.uncond_and_cond(outputs, scales)
        D = inputs.predict(extrapolate(uncond, cond, scales.scale)).x0
        return Prediction(D, inputs.predict(uncond).eps), state
