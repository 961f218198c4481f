"""The config of PixArtTransformer2DModel: diffusers' fields, and which values exist here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of, positive
from jaxdiff.models.dit.config import ACTIVATION_FNS

ADDITIONAL_CONDITIONS_SIZE = 128  # where diffusers' null means that the network takes sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixArtTransformer2DConfig:
    """The fields of a diffusers PixArtTransformer2DModel config.json, with its defaults.

    InputError for values that ask for something that is not implemented.
    """

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "dropout": (0.0,),
        "norm_type": ("ada_norm_single",),
        "norm_elementwise_affine": (False,),
        "use_additional_conditions": (None, False),
        "attention_type": ("default", None),
    }
    NO_EFFECT: ClassVar[Mapping[str, str]] = {
        "norm_num_groups": "no layer has a group norm",
        "num_embeds_ada_norm": "of another kind of norm",
        "upcast_attention": "scores and softmax are always in float32",
    }

    num_attention_heads: int = 16
    attention_head_dim: int = 72  # width of a head
    in_channels: int = 4
    out_channels: int | None = 8  # None: in_channels; twice as many: a learned variance too
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    cross_attention_dim: int = 1152  # width of what the blocks attend to
    attention_bias: bool = True
    sample_size: int = 128  # rows and columns of the latents trained on; others are interpolated
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"  # of the feed-forward layers: one of ACTIVATION_FNS
    num_embeds_ada_norm: int | None = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_single"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    # what positions are divided by; None: by how much sample_size is more than 64
    interpolation_scale: int | float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None  # width of the text's states, which are projected if given
    attention_type: str | None = "default"

    def __post_init__(self) -> None:
        """Refuse what PixArtTransformer2DModel here cannot do, but for the defaults."""
        check_unsupported(self)
        one_of("activation_fn", self.activation_fn, ACTIVATION_FNS)
        for name in (
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "num_layers",
            "cross_attention_dim",
            "sample_size",
            "patch_size",
        ):
            positive(name, getattr(self, name))
        for name in ("out_channels", "caption_channels", "interpolation_scale"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)
        if self.caption_channels is not None and self.cross_attention_dim != self.width:
            raise InputError(
                f"cross_attention_dim: got {self.cross_attention_dim}, expected the width of a "
                f"token, {self.width}, which caption_channels are projected to"
            )

    def check_additional_conditions(self) -> None:
        """InputError for a network that takes the size of the image as well."""
        size = self.sample_size
        if self.use_additional_conditions is None and size == ADDITIONAL_CONDITIONS_SIZE:
            raise InputError(
                f"use_additional_conditions: got null with sample_size {size}, where it means "
                "true, expected false"
            )

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def context_width(self) -> int:
        """Width of the text's states."""
        return self.caption_channels or self.cross_attention_dim

    @property
    def position_scale(self) -> float:
        """What positions are divided by."""
        scale = self.interpolation_scale
        return float(max(self.sample_size // 64, 1) if scale is None else scale)

    @property
    def output_channels(self) -> int:
        """Channels of the network's output."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def learns_variance(self) -> bool:
        """Whether a second half of the channels is a variance (2102.09672, section 3.1)."""
        return self.output_channels == 2 * self.in_channels

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the latents that go in and of the prediction, without a learned variance."""
        predicted = self.in_channels if self.learns_variance else self.output_channels
        return self.in_channels, predicted
