"""Guidance rescale, and static and dynamic thresholding."""

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, PyTree
from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.guidance.base import DenoiserInput, GuidanceScales, Number, Outputs, check
from jaxdiff.guidance.rule import rule
from jaxdiff.guidance.wrapper import Wrapper


@rule
class GuidanceRescale(Wrapper):
    """Guidance rescale (2305.08891, section 3.4), on the network's raw output.

    A share `phi` of the output is brought back to the standard deviation, over each image, of the
    conditional output.
    """

    simplify = Wrapper.simplify_or_drop  # the conditional output has that deviation

    phi: Number = 0.7

    def __post_init__(self) -> None:
        check("phi", self.phi, 0, 1)

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The wrapped rule's prediction with less spread."""
        prediction, state = self.inner.combine(outputs, inputs, scales, state)
        g, (_, cond) = inputs.output(prediction), self.uncond_and_cond(outputs, scales)
        axes = tuple(range(1, g.ndim))
        wide, wanted = (jnp.std(a, axes, keepdims=True) for a in (g, cond))
        factor = jnp.where(wide == 0, 1, wanted / jnp.where(wide == 0, 1, wide))
        return inputs.predict(g * (self.phi * factor + 1 - self.phi)), state


@rule
class StaticThresholding(Wrapper):
    """Static thresholding (Imagen, 2205.11487, section 2.3): images are clipped to +-limit."""

    simplify = Wrapper.simplify_inner

    limit: Number = 1.0

    def __post_init__(self) -> None:
        check("limit", self.limit, 0, 1e6)

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The wrapped rule's image clipped, and the noise that fits it."""
        prediction, state = self.inner.combine(outputs, inputs, scales, state)
        return self._clip(prediction, inputs), state

    def unguided(self, cond: Float[Array, "b *d"], inputs: DenoiserInput) -> Prediction:
        """The wrapped rule's image clipped."""
        return self._clip(self.inner.unguided(cond, inputs), inputs)

    def _clip(self, prediction: Prediction, inputs: DenoiserInput) -> Prediction:
        return inputs.denoised(jnp.clip(prediction.x0, -self.limit, self.limit))


@rule
class DynamicThresholding(Wrapper):
    """Dynamic thresholding (Imagen, 2205.11487, section 2.3).

    Each image is clipped to the `percentile` of its own absolute values, but to `max_limit` at
    most, and shrunk to +-limit, if that is beyond `limit`. Made for pixels in [-1, 1]; latents need
    a wider limit.
    """

    simplify = Wrapper.simplify_inner

    percentile: Number = 0.995
    limit: Number = 1.0
    max_limit: Number = float("inf")  # sample_max_value in diffusers

    def __post_init__(self) -> None:
        check("percentile", self.percentile, 0, 1)
        check("limit", self.limit, 1e-6, 1e6)
        check("max_limit", self.max_limit, 1e-6, float("inf"))

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The wrapped rule's image within its limit, and the noise that fits it."""
        prediction, state = self.inner.combine(outputs, inputs, scales, state)
        return self._bound(prediction, inputs), state

    def unguided(self, cond: Float[Array, "b *d"], inputs: DenoiserInput) -> Prediction:
        """The wrapped rule's image within its limit."""
        return self._bound(self.inner.unguided(cond, inputs), inputs)

    def _bound(self, prediction: Prediction, inputs: DenoiserInput) -> Prediction:
        D = prediction.x0
        values = jnp.abs(D).reshape(len(D), -1)
        edge = jnp.quantile(values, self.percentile, axis=1)
        edge = jnp.maximum(self.limit, jnp.minimum(self.max_limit, edge))
        edge = edge.reshape(-1, *(1,) * (D.ndim - 1))
        return inputs.denoised(jnp.clip(D, -edge, edge) * (self.limit / edge))
