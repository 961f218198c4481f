"""Images that are not finite: which they are, since when, and what may help."""

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


# What images that are not finite are likely to come from.
REMEDIES = (
    "expected finite ones: float16 overflows in some models where bfloat16 and float32 do not "
    "(dtype), and broken weights (a merge, a LoRA) stay broken"
)
