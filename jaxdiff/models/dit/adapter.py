"""A DiT as a pure function of its weights and its conditioning."""

import jax
import jax.numpy as jnp

from jaxdiff.models.network_adapter import NetworkAdapter
from jaxdiff.parallel.sharding import DIT


class DiTAdapter(NetworkAdapter):
    """How a DiT is called."""

    sharding_rules = DIT
    unperturbable = "a DiT"

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image: its class."""
        del size, tokens
        return {"class_labels": jax.ShapeDtypeStruct((), jnp.int32)}
