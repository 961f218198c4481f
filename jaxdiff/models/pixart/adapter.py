"""PixArt's transformer as a pure function of its weights and its conditioning."""

import dataclasses

import jax

from jaxdiff.models.dit.adapter import PatchTransformerAdapter


@dataclasses.dataclass(frozen=True)
class PixArtAdapter(PatchTransformerAdapter):
    """How PixArt's transformer is called, in the pipeline, in trainings and in plans alike."""

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image: the states of so many tokens."""
        del size
        shape = tokens, self.module.config.context_width
        return {"context": jax.ShapeDtypeStruct(shape, self.module.dtype)}
