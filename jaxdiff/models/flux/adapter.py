"""The FLUX.1 transformer as a pure function of its weights and its conditioning."""

import jax
import jax.numpy as jnp

from jaxdiff.models.flux.config import PATCH
from jaxdiff.models.network_adapter import CHANNELS, NetworkAdapter
from jaxdiff.parallel.sharding import FLUX

UNPERTURBABLE = "a transformer without self-attention of its own in the middle"


class FluxAdapter(NetworkAdapter):
    """How a FLUX.1 transformer is called."""

    sharding_rules = FLUX
    unperturbable = UNPERTURBABLE

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
