"""Guidance of networks that learn the variance of a step beside the noise (2102.09672)."""

import dataclasses

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.guidance.base import DenoiserInput, GuidanceScales, Outputs
from jaxdiff.guidance.rule import rule
from jaxdiff.guidance.wrapper import Wrapper


@rule
class LearnedVariance(Wrapper):
    """A rule on outputs whose second half of the channels is a variance (2102.09672, section 3.1).

    The rule guides the first half, as if there were no other. The variance is that of the
    conditional stream, whatever the scale, as in the original DiT and in DeepFloyd IF; of several
    prompts that of the stream that they make together. Where no network is called it is 0.
    """

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The wrapped rule's prediction with the variance of the conditional stream."""
        means, variances = zip(*(_halves(output) for output in outputs), strict=True)
        prediction, state = self.inner.combine(means, inputs, scales, state)
        variance = self.uncond_and_cond(variances, scales)[1]
        return dataclasses.replace(prediction, variance=variance), state

    def unguided(self, cond: Float[Array, "b *d"], inputs: DenoiserInput) -> Prediction:
        """The wrapped rule's prediction with the variance of this stream."""
        mean, variance = _halves(cond)
        return dataclasses.replace(self.inner.unguided(mean, inputs), variance=variance)

    def skipped(self, inputs: DenoiserInput) -> Prediction:
        """No movement, and no variance of it."""
        return dataclasses.replace(self.inner.skipped(inputs), variance=jnp.zeros_like(inputs.x))


def _halves(output: Float[Array, "b *d"]) -> tuple[Array, Array]:
    """The two halves of the channels."""
    first, second = jnp.split(output, 2, axis=-1)
    return first, second
