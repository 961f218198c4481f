"""The config of UNet2DConditionModel: diffusers' fields, and which of their values exist here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of, positive
from jaxdiff.nn.activations import ACTIVATIONS

DOWN_BLOCKS = (
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D",
)
UP_BLOCKS = (
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    "AttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "SimpleCrossAttnUpBlock2D",
)
MID_BLOCKS = (
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2D",
    "UNetMidBlock2DSimpleCrossAttn",
    None,
)
# Blocks that change the resolution in residual blocks, of which resnet_* fields speak.
RESNET_BLOCKS = frozenset(
    kind
    for kind in (*DOWN_BLOCKS, *UP_BLOCKS, *MID_BLOCKS)
    if kind and ("Resnet" in kind or "Simple" in kind)
)
# Additions of UNets that are published with a learned variance only, whatever else goes in.
LEARNED_VARIANCE_ADDITIONS = ("image", "image_hint", "text_image")
HINT_CHANNELS = 4  # of the features of a hint, which go in beside the latents

# The fields that kinds of conditioning need.
ADDITION_WIDTHS: Mapping[str | None, tuple[str, ...]] = {
    "text_time": ("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    "image": ("encoder_hid_dim",),
    "image_hint": ("encoder_hid_dim",),
}
CLASS_WIDTHS: Mapping[str | None, tuple[str, ...]] = {
    "projection": ("projection_class_embeddings_input_dim",),
}

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
        "dropout": (0.0,),
        "encoder_hid_dim_type": (None, "text_proj", "image_proj", "text_image_proj"),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "class_embed_type": (None, "timestep", "identity", "projection"),
        "addition_embed_type": (None, "text_time", "text", "image", "text_image", "image_hint"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
        "attention_type": ("default",),
        "cross_attention_norm": (None, "group_norm"),
        "downsample_padding": (1, 0),
    }
    NO_EFFECT: ClassVar[Mapping[str, str]] = {
        "upcast_attention": "scores and softmax are always in float32",
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
    only_cross_attention: bool | tuple[bool, ...] = False  # no self-attention
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
    encoder_hid_dim: int | None = None  # width of what a projection makes the context of
    encoder_hid_dim_type: str | None = None  # with encoder_hid_dim, None is "text_proj"
    # NUMBER of heads in CrossAttn blocks (a historical misnomer); in Attn and SimpleCrossAttn
    # blocks the width of a head.
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None  # width of the embedding of each of time_ids
    num_class_embeds: int | None = None  # rows of a table of classes, without class_embed_type
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    # in Resnet and SimpleCrossAttn blocks: no activation function before time projections, and
    # what sums of residual blocks are divided by (in the middle, mid_block_scale_factor)
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None  # None: four times the first block's channels
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None  # width of the embedded guidance scale that it is told
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    # of "text_time": text_embeds + time_ids embedded; of "projection": class_labels
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None  # None: if all blocks are
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64  # of "text"
    # Whether the output has a variance behind the prediction, which diffusers' field does not say:
    # None is as in published models, see `learns_variance`.
    learned_variance: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what UNet2DConditionModel here cannot do."""
        check_unsupported(self)
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        one_of("time_embedding_act_fn", self.time_embedding_act_fn, (None, *ACTIVATIONS))
        one_of("mid_block_type", self.mid_block_type, MID_BLOCKS)
        for name, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            self.per_block(name)
            for block in getattr(self, name):
                one_of(name, block, kinds)
        for name in (
            "layers_per_block",
            "attention_head_dim",
            "transformer_layers_per_block",
            "only_cross_attention",
        ):
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
        projection = self.context_projection
        for kind, names in (
            (self.addition_embed_type, ADDITION_WIDTHS.get(self.addition_embed_type, ())),
            (projection, () if projection is None else ("encoder_hid_dim",)),
            (self.class_embed_type, CLASS_WIDTHS.get(self.class_embed_type, ())),
        ):
            for name in names:
                if getattr(self, name) is None:
                    raise InputError(f"{name}: got null, expected a width for {kind}")
        one_width = projection is not None or self.addition_embed_type in ("text", "text_image")
        if one_width and not (self.has_context and isinstance(self.cross_attention_dim, int)):
            raise InputError(
                f"cross_attention_dim: got {self.cross_attention_dim}, expected one width, and "
                "blocks that attend to a context, for its projection"
            )
        if self.addition_embed_type == "text" and projection == "image_proj":
            raise InputError(
                "addition_embed_type: got 'text' with the context of an image, expected text"
            )
        self._check_classes()
        if self.learned_variance and self.out_channels % 2:
            raise InputError(
                f"out_channels: got {self.out_channels}, expected an even number with a variance"
            )

    def _check_classes(self) -> None:
        if self.num_class_embeds is not None and self.class_embed_type is not None:
            raise InputError(
                f"num_class_embeds: got {self.num_class_embeds} with class_embed_type "
                f"{self.class_embed_type}, expected one of both"
            )
        concatenated = self.class_embeddings_concat
        if concatenated and (not self.has_classes or self.addition_embed_type is not None):
            raise InputError(
                "class_embeddings_concat: got true, expected false without an embedding of "
                "classes, or with addition_embed_type"
            )

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
        """Channels of what goes in and of the prediction, without a learned variance."""
        return self.in_channels, self.out_channels // (2 if self.learns_variance else 1)

    @property
    def learns_variance(self) -> bool:
        """Whether a second half of the output is a variance (2102.09672, section 3.1).

        Unless `learned_variance` says it, it is if there are twice as many channels as go in, and
        in UNets whose inputs have others beside the noisy ones: those of DeepFloyd IF's
        super-resolution (class_embed_type "timestep") and of Kandinsky (image embeddings).
        """
        if self.learned_variance is not None:
            return self.learned_variance
        published = (
            self.class_embed_type == "timestep"
            or self.addition_embed_type in LEARNED_VARIANCE_ADDITIONS
        )
        with_more = published and self.out_channels % 2 == 0
        return self.out_channels == 2 * self.in_channels or with_more

    @property
    def concatenated_channels(self) -> int:
        """Channels of the input beside the noisy ones and a hint's."""
        return max(self.in_channels - self.channels[1] - self.hint_channels, 0)

    @property
    def hint_channels(self) -> int:
        """Channels of the input that are features of a hint."""
        return HINT_CHANNELS if self.addition_embed_type == "image_hint" else 0

    @property
    def has_context(self) -> bool:
        """Whether any block attends to a context."""
        types = (*self.down_block_types, self.mid_block_type or "", *self.up_block_types)
        return any("CrossAttn" in block for block in types)

    @property
    def context_projection(self) -> str | None:
        """What makes the context: a value of encoder_hid_dim_type, None if it goes in as it is."""
        named = self.encoder_hid_dim_type
        return "text_proj" if named is None and self.encoder_hid_dim is not None else named

    @property
    def context_width(self) -> int | None:
        """Width of the context that the network is given, None if it is given none."""
        if not self.has_context or self.context_projection == "image_proj":
            return None
        if self.context_projection is not None:
            return self.encoder_hid_dim
        return self.per_block("cross_attention_dim")[0]

    @property
    def masks_context(self) -> bool:
        """Whether the attention can hide tokens of the context."""
        types = (*self.down_block_types, self.mid_block_type or "", *self.up_block_types)
        return all("Simple" in block for block in types if "CrossAttn" in block)

    @property
    def mid_block_is_only_cross_attention(self) -> bool:
        """Whether the middle block has no self-attention; only SimpleCrossAttn can do without."""
        if self.mid_block_type != "UNetMidBlock2DSimpleCrossAttn":
            return False
        if self.mid_block_only_cross_attention is None:
            return self.only_cross_attention is True
        return self.mid_block_only_cross_attention

    @property
    def has_classes(self) -> bool:
        """Whether an embedding of class_labels joins that of the time."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def size_divisor(self) -> int:
        """What rows and columns must be multiples of."""
        types = (*self.down_block_types, *self.up_block_types)
        pools = any(block in RESNET_BLOCKS for block in types)
        return 2 ** (len(self.block_out_channels) - 1) if pools else 1

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def block_time_width(self) -> int:
        """Width of the embedding of time, and of what joins it, that the blocks receive."""
        return self.time_width * (2 if self.class_embeddings_concat else 1)
