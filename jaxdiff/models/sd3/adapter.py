"""An MMDiT as a pure function of its weights and its conditioning."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxdiff.core.types import Array, Bool, Float, Int
from jaxdiff.models.build import with_params
from jaxdiff.models.sd3.module import SD3Transformer2DModel
from jaxdiff.parallel.sharding import MMDIT, Rules


@dataclasses.dataclass(frozen=True)
class SD3Adapter:
    """How an MMDiT is called, in the pipeline, in trainings and in plans alike.

    Adapters of equal networks are equal: the weights of `module` do not count and are not read.
    """

    module: SD3Transformer2DModel = dataclasses.field(compare=False, repr=False)
    prediction_type: str
    graph: Any = dataclasses.field(init=False, repr=False)

    sharding_rules: ClassVar[Rules] = MMDIT

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", nnx.split(self.module)[0])

    def __call__(
        self,
        params: Mapping[str, Any],
        x: Float[Array, "b h w c"],
        t: Float[Array, "b"] | Int[Array, "b"],
        cond: Mapping[str, Array],
        *,
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b h w o"]:
        """The output for noisy latents x at timesteps t, with weights by dotted path.

        `cond` has arguments of the module by name.
        """
        return with_params(self.module, params)(x, t, **cond, perturbed=perturbed)

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image, for latents of `size` and so many tokens."""
        del size
        config, dtype = self.module.config, self.module.dtype
        return {
            "context": jax.ShapeDtypeStruct((tokens, config.joint_attention_dim), dtype),
            "pooled_projections": jax.ShapeDtypeStruct((config.pooled_projection_dim,), dtype),
        }
