"""UNet2DModel: UNets without text, such as a super-resolution of pixels.

Only its config differs from UNet2DConditionModel, and its middle block.
"""

from jaxdiff.models.unet.blocks import make_mid_block_without_text
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2D
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.unet_2d_blocks import MidBlock2D


class UNet2DModel(UNet2D):
    """A UNet that is conditioned on the timestep and, by its config, a class."""

    config: UNet2DConfig

    @property
    def unet_config(self) -> UNet2DConditionConfig:
        """Its config in the fields of UNet2DConditionModel."""
        return self.config.conditional

    def _make_mid_block(self, layers: LayerFactory) -> MidBlock2D | None:
        return make_mid_block_without_text(self.config, layers=layers)
