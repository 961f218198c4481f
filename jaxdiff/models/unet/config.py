"""The config of UNet2DConditionModel: diffusers' fields, and which of their values exist here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of, positive
from jaxdiff.nn.activations import ACTIVATIONS

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)

Depth = int | tuple[int, ...]  # transformer blocks: of all layers of a stage, or of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig:
    """The fields of a diffusers UNet2DConditionModel config.json, with its defaults.

    A tuple has one entry for each block, from the highest resolution down. `upcast_attention`
    changes nothing: scores and softmax are always in float32. InputError for values that ask for
    something that is not implemented.
    """

    # Fields for model families that are not implemented, with the only values accepted.
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "only_cross_attention": (False,),
        "dropout": (0.0,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "class_embed_type": (None,),
        "addition_embed_type": (None, "text_time"),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
        "downsample_padding": (1, 0),
    }
    NO_EFFECT: ClassVar[Mapping[str, str]] = {
        "upcast_attention": "scores and softmax are always in float32",
        "addition_embed_type_num_heads": "of kinds that are refused",
    }

    sample_size: int | tuple[int, ...] | None = None  # of the latents trained on; informative
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False  # the network sees 2 x - 1
    flip_sin_to_cos: bool = True  # time embedding: cosines first
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2  # the way up has one more
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] | None = 1280  # width of the context
    transformer_layers_per_block: int | tuple[Depth, ...] = 1
    reverse_transformer_layers_per_block: tuple[Depth, ...] | None = None  # of the way up
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    # NUMBER of heads in cross-attention blocks (a historical misnomer); in AttnDown/UpBlock2D the
    # width of a head.
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None  # width of the embedding of each of time_ids
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None  # None: four times the first block's channels
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None  # width of the embedded guidance scale that it is told
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None  # text_embeds + time_ids embedded
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64  # only read by addition types not implemented here

    def __post_init__(self) -> None:
        """Refuse what UNet2DConditionModel here cannot do."""
        check_unsupported(self)
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        one_of("mid_block_type", self.mid_block_type, MID_BLOCKS)
        for name, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            self.per_block(name)
            for block in getattr(self, name):
                one_of(name, block, kinds)
        for name in ("layers_per_block", "attention_head_dim", "transformer_layers_per_block"):
            self.per_block(name)
        for name in ("in_channels", "out_channels", "norm_num_groups"):
            positive(name, getattr(self, name))
        if self.reverse_transformer_layers_per_block is not None:
            self.per_block("reverse_transformer_layers_per_block")
        elif any(isinstance(d, tuple) for d in self.per_block("transformer_layers_per_block")):
            raise InputError(
                "reverse_transformer_layers_per_block: got null, expected a list, since"
                " transformer_layers_per_block gives each layer's depth"
            )
        self._check_conditioning()

    def _check_conditioning(self) -> None:
        if self.has_context and None in self.per_block("cross_attention_dim"):
            raise InputError("cross_attention_dim: got null, expected a width for the attention")
        if self.addition_embed_type == "text_time":
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if getattr(self, name) is None:
                    raise InputError(f"{name}: got null, expected a width for text_time")

    def per_block(self, name: str) -> tuple[Any, ...]:
        """Field `name` with one entry for each down block; InputError for another number."""
        value = getattr(self, name)
        blocks = len(self.block_out_channels)
        if not isinstance(value, tuple):
            return (value,) * blocks
        if len(value) != blocks:
            raise InputError(f"{name}: got {len(value)} entries, expected {blocks}")
        return value

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of what goes in and of the prediction."""
        return self.in_channels, self.out_channels

    @property
    def has_context(self) -> bool:
        """Whether any block attends to a context."""
        types = (*self.down_block_types, self.mid_block_type or "", *self.up_block_types)
        return any("CrossAttn" in block for block in types)

    @property
    def time_width(self) -> int:
        """Width of the time embedding that the blocks receive."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]
