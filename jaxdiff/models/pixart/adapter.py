"""PixArt's transformer as a pure function of its weights and its conditioning."""

import jax

from jaxdiff.models.network_adapter import NetworkAdapter
from jaxdiff.parallel.sharding import DIT


class PixArtAdapter(NetworkAdapter):
    """How PixArt's transformer is called."""

    sharding_rules = DIT
    unperturbable = "PixArt's transformer"

    def conditioning_shapes(
        self, size: tuple[int, int], tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """The conditioning of one stream of one image: the states of so many tokens."""
        del size
        shape = tokens, self.module.config.context_width
        return {"context": jax.ShapeDtypeStruct(shape, self.module.dtype)}
