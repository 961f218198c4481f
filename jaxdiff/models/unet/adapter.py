"""A UNet as a pure function of its weights and its conditioning."""

import jax
import jax.numpy as jnp

from jaxdiff.models.network_adapter import CHANNELS, NetworkAdapter
from jaxdiff.parallel.sharding import UNET

NUM_TIME_IDS = 6  # original size, crop and target size, two numbers each


class UNetAdapter(NetworkAdapter):
    """How a UNet is called."""

    sharding_rules = UNET
    is_transformer = False

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
