"""Transformers on patches of latents as pure functions of their weights and their conditioning."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int
from jaxdiff.models.build import with_params
from jaxdiff.parallel.sharding import DIT, Rules


@dataclasses.dataclass(frozen=True)
class PatchTransformerAdapter(ABC):
    """How such a transformer is called, in the pipeline, in trainings and in plans alike.

    Adapters of equal networks are equal: the weights of `module` do not count and are not read.
    """

    module: Any = dataclasses.field(compare=False, repr=False)
    prediction_type: str
    graph: Any = dataclasses.field(init=False, repr=False)

    sharding_rules: ClassVar[Rules] = DIT

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
        """The prediction for noisy latents x at timesteps t, with weights by dotted path.

        `cond` has arguments of the module by name. A learned variance, the second half of the
        channels, is left out: no sampler here reads it, and no loss trains it.
        """
        if perturbed is not None:
            raise InputError(
                f"guidance: got perturbed attention for a {type(self.module).__name__}, expected a "
                "UNet with attention in its middle block"
            )
        output = with_params(self.module, params)(x, t, **cond)
        return output[..., : self.module.config.channels[1]]

    @abstractmethod
    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image."""


@dataclasses.dataclass(frozen=True)
class DiTAdapter(PatchTransformerAdapter):
    """How a DiT is called."""

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image: its class."""
        del size, tokens
        return {"class_labels": jax.ShapeDtypeStruct((), jnp.int32)}
