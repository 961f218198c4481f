"""The config of SD3Transformer2DModel: diffusers' fields, and which of their values exist here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class SD3Transformer2DConfig:
    """The fields of a diffusers SD3Transformer2DModel config.json, with its defaults.

    InputError for values that ask for something that is not implemented.
    """

    # Fields for networks that are not implemented, with the only values accepted.
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"qk_norm": (None, "rms_norm")}

    sample_size: int = 128  # side of the latents trained on; new positions are scaled by it
    patch_size: int = 2  # side of a patch, which is one token, in latents
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64  # width of a head
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096  # width of the context
    caption_projection_dim: int = 1152  # what it is projected to: the width of the network
    pooled_projection_dim: int = 2048  # width of the pooled embedding
    out_channels: int | None = 16  # None: in_channels
    pos_embed_max_size: int = 96  # side of the grid of positions, in patches
    dual_attention_layers: tuple[int, ...] = ()  # blocks with a second attention of image tokens
    qk_norm: str | None = None  # of queries and keys

    def __post_init__(self) -> None:
        """Refuse what SD3Transformer2DModel here cannot do."""
        check_unsupported(self)
        for name in (
            "sample_size",
            "patch_size",
            "in_channels",
            "num_layers",
            "attention_head_dim",
            "num_attention_heads",
            "pos_embed_max_size",
        ):
            positive(name, getattr(self, name))
        if self.caption_projection_dim != self.width:
            raise InputError(
                f"caption_projection_dim: got {self.caption_projection_dim}, expected {self.width} "
                "(num_attention_heads times attention_head_dim)"
            )
        if self.width % 4:
            raise InputError(f"width: got {self.width}, expected a multiple of 4 for its positions")
        beyond = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if beyond:
            raise InputError(
                f"dual_attention_layers: got {beyond[0]}, "
                f"expected numbers of layers from 0 to {self.num_layers - 1}"
            )

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the input and of the output."""
        return self.in_channels, self.out_channels or self.in_channels
