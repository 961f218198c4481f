"""Images that a rule does not guide at a level: skipped, or by the conditional stream alone."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Int, PyTree
from jaxdiff.diffusion.denoising import Prediction, select
from jaxdiff.guidance.base import GUIDED, SKIP, DenoiserInput, Guidance, GuidanceScales, Outputs


def denoise_by_mode(
    mode: int | Int[Array, "b"],
    rule: Guidance,
    call_streams: Callable[[Sequence[int]], Outputs],
    inputs: DenoiserInput,
    scales: GuidanceScales,
    state: PyTree,
    *,
    uniform: bool = False,
) -> tuple[Prediction, PyTree]:
    """The prediction of each image in its `mode`, by the outputs of `call_streams`.

    Where the rule guides no image the conditional stream is run alone, and where it skips all none,
    but not with `uniform`: all streams are always run, so that no image rounds otherwise because of
    what the others need.
    """
    mode = jnp.where(inputs.level.active, mode, SKIP)
    every = range(len(rule.streams))

    def skip() -> tuple[Prediction, PyTree]:
        return rule.skipped(inputs), state

    def unguided(cond: Float[Array, "b *d"]) -> tuple[Prediction, PyTree]:
        return select(mode == SKIP, skip(), (rule.unguided(cond, inputs), state))

    def conditional() -> tuple[Prediction, PyTree]:
        if rule.cond_stream is not None:
            return unguided(*call_streams([rule.cond_stream]))
        return unguided(rule.uncond_and_cond(call_streams(every), scales)[1])

    def guided() -> tuple[Prediction, PyTree]:
        outputs = call_streams(every)
        cond = rule.uncond_and_cond(outputs, scales)[1]
        combined = rule.combine(outputs, inputs, scales, state)
        return select(mode == GUIDED, combined, unguided(cond))

    if uniform:
        return guided()
    # by what the image that needs most needs; each has its own of it
    return jax.lax.switch(jnp.max(mode), (skip, conditional, guided))
