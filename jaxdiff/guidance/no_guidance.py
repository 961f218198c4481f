"""No guidance."""

from jaxdiff.core.types import PyTree
from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.guidance.base import DenoiserInput, Guidance, GuidanceScales, Outputs, Stream
from jaxdiff.guidance.rule import rule


@rule
class NoGuidance(Guidance):
    """No guidance: one stream, the conditional model as it is. Ignores the scale."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The prompt."""
        return (Stream(),)

    @property
    def cond_stream(self) -> int:
        """The only stream."""
        return 0

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The prediction of the only stream."""
        return inputs.predict(outputs[0]), state
