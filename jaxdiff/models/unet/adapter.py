"""A UNet as a pure function of its weights and its conditioning."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.models.network_adapter import CHANNELS, NetworkAdapter
from jaxdiff.models.unet.conditioning import conditioning_sizes
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
        config, dtype = self.module.unet_config, self.module.dtype
        shapes = conditioning_sizes(config, size, tokens, NUM_TIME_IDS)
        if config.concatenated_channels:
            shapes[CHANNELS] = (*size, config.concatenated_channels)
        dtypes: dict[str, Any] = dict.fromkeys(("context", "text_embeds", "image_embeds"), dtype)
        if config.num_class_embeds is not None:
            dtypes["class_labels"] = jnp.int32
        return {
            name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.float32))
            for name, shape in shapes.items()
        }
