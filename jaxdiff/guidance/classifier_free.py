"""Classifier-free guidance (2207.12598).

Its scale w says how far to go from the null stream: w = 0 is unconditional and w = 1 the plain
conditional model. (The paper's weight is w - 1.) All weights of these rules sum to 1 and the kinds
of prediction are affine in one another, so combining raw outputs is combining scores.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxdiff.core.types import Array, PyTree
from jaxdiff.diffusion.denoising import Prediction, per_image
from jaxdiff.guidance.base import (
    DenoiserInput,
    Guidance,
    GuidanceScales,
    Outputs,
    Stream,
    check,
    extrapolate,
)
from jaxdiff.guidance.no_guidance import NoGuidance
from jaxdiff.guidance.rule import rule

MAX_CHANNELS = 1024


@rule
class CondUncond(Guidance):
    """Rules between a null stream, or that of a negative prompt, and a conditional one.

    Several prompts of an image (`num_prompts`) make one conditional stream, uncond + sum_i w_i
    (cond_i - uncond) (composable diffusion, 2206.01714, eq. 11; a prompt with negative w_i is a
    NOT). That is the score of a product of densities at the last noise level, and near it at the
    others.
    """

    internal = ("num_prompts",)

    num_prompts: int = 1

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Null, then the prompts."""
        return Stream("negative"), *(Stream(prompt_index=i) for i in range(self.num_prompts))

    @property
    def cond_stream(self) -> int | None:
        """The stream of the prompt, if there is one."""
        return 1 if self.num_prompts == 1 else None

    def uncond_and_cond(self, outputs: Outputs, scales: GuidanceScales) -> tuple[Array, Array]:
        """The null stream, and the conditional one that the prompts make together."""
        uncond, *conds = outputs[: 1 + self.num_prompts]
        if scales.weights is None and len(conds) == 1:
            return uncond, conds[0]
        weights = scales.weights
        if weights is None:
            weights = jnp.ones((len(uncond), self.num_prompts), uncond.dtype)
        steps = [per_image(weights[:, i], c) * (c - uncond) for i, c in enumerate(conds)]
        return uncond, uncond + sum(steps)

    def for_prompts(self, num_prompts: int) -> Guidance:
        """The same rule for that many prompts."""
        return dataclasses.replace(self, num_prompts=num_prompts)


@rule
class ClassifierFree(CondUncond):
    """g = uncond + w (cond - uncond) (2207.12598, eq. 6, in the form of Imagen).

    With `channels` above 0 only so many channels of the network's output are guided, the first
    ones, and the others are the conditional stream's. The code of DiT (2212.09748) and of SiT
    (2401.08740) guides 3 of the 4 channels of their latents; diffusers guides all.
    """

    channels: int = 0  # 0: all

    def __post_init__(self) -> None:
        check("channels", self.channels, 0, MAX_CHANNELS)

    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """The prediction extrapolated from the null stream through the conditional one."""
        uncond, cond = self.uncond_and_cond(outputs, scales)
        output = extrapolate(uncond, cond, scales.scale)
        if self.channels:
            own = self.channels
            output = jnp.concatenate([output[..., :own], cond[..., own:]], axis=-1)
        return inputs.predict(output), state

    def simplify(self, scales: Sequence[float]) -> Guidance:
        """At w = 1 no null stream is run."""
        one = self.num_prompts == 1 and all(w == 1 for w in scales)
        return NoGuidance() if one else self
