"""A prior as a pure function of its weights and its conditioning."""

import jax
import jax.numpy as jnp

from jaxdiff.models.network_adapter import NetworkAdapter
from jaxdiff.parallel.sharding import DIT


class PriorAdapter(NetworkAdapter):
    """How a prior is called, on image embeddings (b, d)."""

    sharding_rules = DIT
    unperturbable = "a prior"

    def conditioning_shapes(
        self, size: tuple[int, ...], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image: a text of so many tokens."""
        del size
        config, dtype = self.module.config, self.module.dtype
        return {
            "context": jax.ShapeDtypeStruct((tokens, config.embedding_dim), dtype),
            "text_embeds": jax.ShapeDtypeStruct((config.pooled_width,), dtype),
            "context_mask": jax.ShapeDtypeStruct((tokens,), jnp.bool),
        }
