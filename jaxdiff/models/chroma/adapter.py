"""The Chroma transformer as a pure function of its weights and its conditioning."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Bool, Float
from jaxdiff.models.build import with_params
from jaxdiff.models.chroma.module import ChromaTransformer2DModel
from jaxdiff.models.flux.adapter import refuse_perturbed
from jaxdiff.parallel.sharding import FLUX, Rules


@dataclasses.dataclass(frozen=True)
class ChromaAdapter:
    """How a Chroma transformer is called, in the pipeline, in trainings and in plans alike.

    Adapters of equal networks are equal: the weights of `module` do not count and are not read.
    """

    module: ChromaTransformer2DModel = dataclasses.field(compare=False, repr=False)
    prediction_type: str
    graph: Any = dataclasses.field(init=False, repr=False)

    sharding_rules: ClassVar[Rules] = FLUX

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", nnx.split(self.module)[0])

    def __call__(
        self,
        params: Mapping[str, Any],
        x: Float[Array, "b h w c"],
        t: Float[Array, "b"],
        cond: Mapping[str, Array],
        *,
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The output for noisy latents x at times t, 0 to 1000, with weights by dotted path.

        `cond` has arguments of the module by name. InputError for `perturbed`, as the network has
        no attention to switch off.
        """
        refuse_perturbed(perturbed)
        return with_params(self.module, params)(x, t, **cond)

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image, for so many tokens of text."""
        del size
        states = tokens, self.module.config.joint_attention_dim
        return {
            "context": jax.ShapeDtypeStruct(states, self.module.dtype),
            "context_mask": jax.ShapeDtypeStruct((tokens,), jnp.bool),
        }
