"""The config of FluxTransformer2DModel, by diffusers' fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import positive

PATCH = 2  # latents along the side of a token; diffusers packs them before it calls the network
MLP_RATIO = 4  # width inside the perceptrons, over that of tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxTokensConfig:
    """What the transformers of the FLUX.1 family have in common: tokens, heads and blocks.

    Channels are those of tokens, which are 2 x 2 latents: four times the channels of latents.
    InputError for values that do not fit together.
    """

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"patch_size": (1,)}
    NO_EFFECT: ClassVar[Mapping[str, str]] = {}

    patch_size: int = 1  # of packed latents
    in_channels: int = 64  # more than out_channels: latents of an image and a mask come along
    out_channels: int | None = None  # None: as many as in_channels
    num_layers: int = 19  # blocks with weights of their own for text and image
    num_single_layers: int = 38  # blocks in which both share their weights
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # width of the text states
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # of a head: image number, row, column

    def __post_init__(self) -> None:
        """Refuse what the networks here cannot do."""
        check_unsupported(self)
        for name in ("attention_head_dim", "num_attention_heads", "joint_attention_dim"):
            positive(name, getattr(self, name))
        for name in ("in_channels", "out_channels"):
            if (channels := getattr(self, name)) is not None and channels % PATCH**2:
                raise InputError(f"{name}: got {channels}, expected a multiple of {PATCH**2}")
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(n % 2 for n in axes):
            raise InputError(
                f"axes_dims_rope: got {axes}, expected 3 even numbers whose sum is "
                f"attention_head_dim, {self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        """Of tokens inside the network."""
        return self.attention_head_dim * self.num_attention_heads

    @property
    def token_channels(self) -> int:
        """Numbers of each token that the network predicts."""
        return self.out_channels or self.in_channels

    @property
    def channels(self) -> tuple[int, int]:
        """Of the latents that go in and come out."""
        return self.in_channels // PATCH**2, self.token_channels // PATCH**2

    @property
    def sample_size(self) -> int:
        """The side in latents at which these networks are used, for 1024 pixels."""
        return 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxTransformer2DConfig(FluxTokensConfig):
    """The fields of a diffusers FluxTransformer2DModel config.json, with its defaults."""

    pooled_projection_dim: int = 768  # width of the pooled text embedding
    guidance_embeds: bool = False  # guidance-distilled: the network takes the guidance scale
