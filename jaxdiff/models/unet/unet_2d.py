"""UNet2DModel: UNets without text, such as a super-resolution of pixels.

Only its config differs from UNet2DConditionModel, and its middle block.
"""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Dtype
from jaxdiff.models.unet.blocks import make_mid_block_without_text
from jaxdiff.models.unet.module import UNet2D
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig
from jaxdiff.nn.layers import LayerFactory


class UNet2DModel(UNet2D):
    """A UNet that is conditioned on the timestep and, by its config, a class."""

    def __init__(
        self,
        config: UNet2DConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        remat: str = "none",
        rngs: nnx.Rngs | None,
    ):
        super().__init__(
            config.conditional,
            dtype=dtype,
            param_dtype=param_dtype,
            attention=attention,
            remat=remat,
            rngs=rngs,
        )
        self.config = config
        layers = LayerFactory(
            rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention, remat=remat
        )
        self.mid_block = nnx.data(make_mid_block_without_text(config, layers=layers))
