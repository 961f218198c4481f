"""The config of UNet2DModel: diffusers' fields, and which of their values exist here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.models.unet.config import DOWN_BLOCKS, UP_BLOCKS, UNet2DConditionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConfig:
    """The fields of a diffusers UNet2DModel config.json, with its defaults.

    InputError for values that ask for something that is not implemented.
    """

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "time_embedding_type": ("positional",),
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_padding": (1, 0),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
        "dropout": (0.0,),
        "act_fn": ("silu", "swish"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None, "timestep", "identity"),
    }
    NO_EFFECT: ClassVar[Mapping[str, str]] = {
        "num_train_timesteps": "only read with a time_embedding_type that is refused",
    }

    sample_size: int | tuple[int, ...] | None = None  # of the images trained on; informative
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False  # the network sees 2 x - 1
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None  # None: four times the first block's channels
    freq_shift: int | float = 0
    flip_sin_to_cos: bool = True  # time embedding: cosines first
    down_block_types: tuple[str, ...] = ("DownBlock2D", *("AttnDownBlock2D",) * 3)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (*("AttnUpBlock2D",) * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2  # the way up has one more
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int = 8  # width of a head
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None  # in the middle block; None: norm_num_groups
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True  # in the middle block
    class_embed_type: str | None = None
    num_class_embeds: int | None = None  # rows of a table of classes, without class_embed_type
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        """Refuse what UNet2DModel here cannot do."""
        check_unsupported(self)
        for name, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for block in getattr(self, name):
                one_of(name, block, [kind for kind in kinds if "CrossAttn" not in kind])
        if self.mid_block_type is not None and self.add_attention:
            if self.mid_block_scale_factor != 1:
                raise InputError(
                    f"mid_block_scale_factor: got {self.mid_block_scale_factor} with "
                    "add_attention, expected 1"
                )
            if self.resnet_time_scale_shift != "default" and self.attn_norm_num_groups is None:
                raise InputError(
                    "attn_norm_num_groups: got null with resnet_time_scale_shift "
                    f"{self.resnet_time_scale_shift}, expected a number"
                )
        _ = self.conditional

    @property
    def conditional(self) -> UNet2DConditionConfig:
        """The same network in the fields of UNet2DConditionModel, but for its middle block."""
        shared = {field.name for field in dataclasses.fields(UNet2DConditionConfig)}
        values: dict[str, Any] = {
            name: value for name, value in vars(self).items() if name in shared
        }
        values |= {"mid_block_type": None, "cross_attention_dim": None}
        return UNet2DConditionConfig(**values)

    @property
    def learns_variance(self) -> bool:
        """Whether a second half of the output is a variance (2102.09672, section 3.1)."""
        return self.conditional.learns_variance

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of what goes in and of the prediction, without a learned variance."""
        return self.conditional.channels
