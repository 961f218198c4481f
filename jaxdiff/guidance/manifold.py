"""CFG++: guidance in the denoised image only, which keeps the path on the data's manifold."""

from jaxdiff.core.types import PyTree
from jaxdiff.diffusion.predictions import Prediction
from jaxdiff.guidance.classifier_free import Outputs, TwoStreams
from jaxdiff.guidance.rule import Dials, Query, extrapolate, rule


@rule
class ManifoldConstrained(TwoStreams):
    """CFG++ (2406.08070, algorithm 1): the image of the guided stream, the noise of the null one.

    Its scale, written lambda in the paper, goes from 0, which is unconditional, to 1. On the ODE a
    step from ratio r to r' is that of classifier-free guidance with w = scale r / (r - r'). Only
    samplers that add noise back along `Prediction.eps` can follow it.
    """

    def combine(
        self, outputs: Outputs, query: Query, dials: Dials, memory: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The guided image and the noise of the null stream."""
        uncond, cond = self.ends(outputs, dials)
        D = query.predict(extrapolate(uncond, cond, dials.scale)).x0
        return Prediction(D, query.predict(uncond).eps), memory
