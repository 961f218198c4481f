"""The config of DiTTransformer2DModel: diffusers' fields, and which of their values exist here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.validate import one_of, positive

ACTIVATION_FNS = ("gelu-approximate", "gelu", "geglu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTTransformer2DConfig:
    """The fields of a diffusers DiTTransformer2DModel config.json, with its defaults.

    InputError for values that ask for something that is not implemented.
    """

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "dropout": (0.0,),
        "norm_type": ("ada_norm_zero",),
        "norm_elementwise_affine": (False,),
    }
    NO_EFFECT: ClassVar[Mapping[str, str]] = {
        "norm_num_groups": "no layer has a group norm",
        "upcast_attention": "scores and softmax are always in float32",
    }
    # What the class was called before, Transformer2DModel, has for other models, and DiT's values.
    ABSENT: ClassVar[Mapping[str, Any]] = {
        "attention_type": "default",
        "caption_channels": None,
        "cross_attention_dim": None,
        "double_self_attention": False,
        "interpolation_scale": None,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_additional_conditions": None,
        "use_linear_projection": False,
    }

    num_attention_heads: int = 16
    attention_head_dim: int = 72  # width of a head
    in_channels: int = 4
    out_channels: int | None = None  # None: in_channels; twice as many: a learned variance too
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: int = 32  # rows and columns of the latents trained on; others are interpolated
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"  # of the feed-forward layers: one of ACTIVATION_FNS
    num_embeds_ada_norm: int = 1000  # classes; the label after the last one is no class
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5  # before the feed-forward layers; 1e-6 elsewhere
    # of the timestep's frequencies: 1 in diffusers, which has no such field, 0 in the authors' code
    freq_shift: int | float = 1
    # of the time that is embedded: 1 - t / 1000 in place of t, as SiT has it, where 0 is noise
    reverses_time: bool = False

    def __post_init__(self) -> None:
        """Refuse what DiTTransformer2DModel here cannot do."""
        check_unsupported(self)
        one_of("activation_fn", self.activation_fn, ACTIVATION_FNS)
        for name in (
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "num_layers",
            "sample_size",
            "patch_size",
            "num_embeds_ada_norm",
        ):
            positive(name, getattr(self, name))
        if self.out_channels is not None:
            positive("out_channels", self.out_channels)

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

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
