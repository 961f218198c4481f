"""The FLUX.1 transformer as a pure function of its weights and its conditioning."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float
from jaxdiff.models.build import with_params
from jaxdiff.models.flux.config import PATCH
from jaxdiff.models.flux.module import FluxTransformer2DModel
from jaxdiff.parallel.sharding import FLUX, Rules

CHANNELS = "channels"  # the conditioning that is concatenated to the noisy latents


@dataclasses.dataclass(frozen=True)
class FluxAdapter:
    """How a FLUX.1 transformer is called, in the pipeline, in trainings and in plans alike.

    Adapters of equal networks are equal: the weights of `module` do not count and are not read.
    """

    module: FluxTransformer2DModel = dataclasses.field(compare=False, repr=False)
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

        `cond` has arguments of the module by name, and `channels` (b, h, w, c) to concatenate to x.
        InputError for `perturbed`, as the network has no attention to switch off.
        """
        refuse_perturbed(perturbed)
        arguments = dict(cond)
        if CHANNELS in arguments:
            x = jnp.concatenate([x, arguments.pop(CHANNELS).astype(x.dtype)], axis=-1)
        return with_params(self.module, params)(x, t, **arguments)

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image, for latents of `size` and so many tokens."""
        config, dtype = self.module.config, self.module.dtype
        shapes = {
            "context": jax.ShapeDtypeStruct((tokens, config.joint_attention_dim), dtype),
            "pooled_projections": jax.ShapeDtypeStruct((config.pooled_projection_dim,), dtype),
        }
        if config.guidance_embeds:
            shapes["guidance"] = jax.ShapeDtypeStruct((), jnp.float32)
        if more := (config.in_channels - config.token_channels) // PATCH**2:
            shapes[CHANNELS] = jax.ShapeDtypeStruct((*size, more), jnp.float32)
        return shapes


def refuse_perturbed(perturbed: Array | None) -> None:
    """InputError where a guidance rule perturbs self-attention."""
    if perturbed is not None:
        raise InputError(
            "guidance: got perturbed attention for a transformer without self-attention of its "
            "own in the middle, expected another rule, or a UNet"
        )
