"""An MMDiT as a pure function of its weights and its conditioning."""

import jax

from jaxdiff.models.network_adapter import NetworkAdapter
from jaxdiff.parallel.sharding import MMDIT


class SD3Adapter(NetworkAdapter):
    """How an MMDiT is called."""

    sharding_rules = MMDIT

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
