"""Images that are not finite: which they are, since when, and what may help."""

from collections.abc import Sequence

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Bool, Float, NDArray
from jaxdiff.pipeline.output import Output


class NonFiniteImageError(RuntimeError):
    """Images that are not finite; `output` has them and all others of the call."""

    def __init__(self, output: Output) -> None:
        self.output = output
        number, why = next(iter(output.failures.items()))
        count = f"{len(output.failures)} of {len(output.requests)} images"
        prompt, seed = output.requests[number].prompt, output.requests[number].seed
        super().__init__(
            f"{count}: got numbers that are not finite, first for {prompt!r:.60} (seed {seed}) "
            f"{why}, {REMEDIES}"
        )


def since_when(steps: Sequence[int], pairs: Float[NDArray, "n 2 *d"], total: int) -> str:
    """Where the latents of an image, x and D of `steps` of `total`, stop being finite."""
    for step, pair in zip(steps, pairs, strict=True):
        if not np.isfinite(pair).all():
            return f"from step {step} of {total}"
    return "in the last step or the decoder"


def check_finite(name: str, finite: Bool[NDArray, "b"]) -> None:
    """InputError that names the images which are not finite."""
    if not finite.all():
        got = np.flatnonzero(~finite).tolist()
        raise InputError(f"{name}: got images {got} that are not finite, {REMEDIES}")


# What images that are not finite are likely to come from.
REMEDIES = (
    "expected finite ones: float16 overflows in some models where bfloat16 and float32 do not "
    "(dtype), and broken weights (a merge, a LoRA) stay broken"
)
