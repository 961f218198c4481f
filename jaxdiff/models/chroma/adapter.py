"""The Chroma transformer as a pure function of its weights and its conditioning."""

import jax
import jax.numpy as jnp

from jaxdiff.models.flux.adapter import UNPERTURBABLE
from jaxdiff.models.network_adapter import NetworkAdapter
from jaxdiff.parallel.sharding import FLUX


class ChromaAdapter(NetworkAdapter):
    """How a Chroma transformer is called."""

    sharding_rules = FLUX
    unperturbable = UNPERTURBABLE

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
