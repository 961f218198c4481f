"""A UNet as a pure function of its weights and its conditioning."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Bool, Float, Int
from jaxdiff.models.build import with_params
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.parallel.sharding import UNET, Rules

CHANNELS = "channels"  # the conditioning that is concatenated to the noisy latents
NUM_TIME_IDS = 6  # original size, crop and target size, two numbers each


@dataclasses.dataclass(frozen=True)
class UNetAdapter:
    """How a UNet is called, in the pipeline, in trainings and in plans alike.

    Adapters of equal networks are equal: the weights of `module` do not count and are not read.
    """

    module: UNet2DConditionModel = dataclasses.field(compare=False, repr=False)
    prediction_type: str
    graph: Any = dataclasses.field(init=False, repr=False)

    sharding_rules: ClassVar[Rules] = UNET

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

        `cond` has arguments of the module by name, and `channels` (b, h, w, c) to concatenate to x.
        """
        arguments = dict(cond)
        if CHANNELS in arguments:
            x = jnp.concatenate([x, arguments.pop(CHANNELS)], axis=-1)
        return with_params(self.module, params)(x, t, **arguments, perturbed=perturbed)

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image, for latents of `size` and so many tokens."""
        config, dtype = self.module.config, self.module.dtype
        shapes: dict[str, tuple[int, ...]] = {}
        if config.has_context:
            shapes["context"] = (tokens, config.per_block("cross_attention_dim")[0])
        if config.addition_embed_type is not None:
            embedded = NUM_TIME_IDS * (config.addition_time_embed_dim or 0)
            pooled = (config.projection_class_embeddings_input_dim or 0) - embedded
            shapes |= {"text_embeds": (pooled,), "time_ids": (NUM_TIME_IDS,)}
        if config.time_cond_proj_dim is not None:
            shapes["timestep_cond"] = (config.time_cond_proj_dim,)
        if config.in_channels > config.out_channels:
            shapes[CHANNELS] = (*size, config.in_channels - config.out_channels)
        text = ("context", "text_embeds")
        return {
            name: jax.ShapeDtypeStruct(shape, dtype if name in text else jnp.float32)
            for name, shape in shapes.items()
        }
