"""What each diffusers block type of a UNet2DConditionModel consists of."""

from collections.abc import Iterable

from jaxdiff.models.unet.config import RESNET_BLOCKS, Depth, UNet2DConditionConfig
from jaxdiff.models.unet.unet_2d_config import UNet2DConfig
from jaxdiff.nn.added_kv_attention import AddedKVAttention
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.resnet import Downsample, ResnetBlock, Upsample
from jaxdiff.nn.transformer import SpatialSelfAttention, SpatialTransformer
from jaxdiff.nn.unet_2d_blocks import AttentionLayer, DownBlock2D, MidBlock2D, UpBlock2D


def _resnets(
    config: UNet2DConditionConfig,
    kind: str,
    widths: Iterable[tuple[int, int]],
    layers: LayerFactory,
    *,
    output_scale: float | None = None,
    resample: str | None = None,
) -> list[ResnetBlock]:
    """Residual blocks of a block of the type `kind`, by channels that go in and come out."""
    whole = kind in RESNET_BLOCKS
    if output_scale is None:
        output_scale = config.resnet_out_scale_factor if whole else 1.0
    return [
        ResnetBlock(
            n_in,
            n_out,
            layers=layers,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act=config.act_fn,
            time_width=config.block_time_width,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            output_scale=output_scale,
            zero_init=True,
            resample=resample,
            time_act=not (whole and config.resnet_skip_time_act),
        )
        for n_in, n_out in widths
    ]


def _attention_layers(
    config: UNet2DConditionConfig,
    kind: str,
    block: int,
    count: int,
    depth: Depth,
    layers: LayerFactory,
    *,
    head_width: int,
    only_cross_attention: bool = False,
) -> list[AttentionLayer] | None:
    """`count` attention modules for the block type `kind` with the sizes of down block `block`."""
    channels, groups = config.block_out_channels[block], config.norm_num_groups
    if "SimpleCrossAttn" in kind:
        return [
            AddedKVAttention(
                channels,
                layers=layers,
                head_width=head_width,
                context_width=config.per_block("cross_attention_dim")[block],
                groups=groups,
                norms_context=config.cross_attention_norm is not None,
                only_cross_attention=only_cross_attention,
            )
            for _ in range(count)
        ]
    if "CrossAttn" in kind:
        return [
            SpatialTransformer(
                channels,
                layers=layers,
                heads=config.per_block("attention_head_dim")[block],
                context_width=config.per_block("cross_attention_dim")[block],
                depth=depth[i] if isinstance(depth, tuple) else depth,
                groups=groups,
                linear=config.use_linear_projection,
                only_cross_attention=only_cross_attention,
            )
            for i in range(count)
        ]
    if kind.startswith("Attn"):
        heads = channels // head_width
        return [
            SpatialSelfAttention(
                channels, layers=layers, heads=heads, groups=groups, eps=config.norm_eps
            )
            for _ in range(count)
        ]
    return None


def make_down_block(
    config: UNet2DConditionConfig, block: int, *, layers: LayerFactory
) -> DownBlock2D:
    """Down block number `block`, counted from the highest resolution."""
    channels, kind = config.block_out_channels, config.down_block_types[block]
    n_in, n_out = channels[max(block - 1, 0)], channels[block]
    count = config.per_block("layers_per_block")[block]
    mixers = _attention_layers(
        config,
        kind,
        block,
        count,
        config.per_block("transformer_layers_per_block")[block],
        layers,
        head_width=config.per_block("attention_head_dim")[block],
        only_cross_attention=config.per_block("only_cross_attention")[block],
    )
    widths = [(n_in if i == 0 else n_out, n_out) for i in range(count)]
    downsampler = None
    if block < len(channels) - 1:
        if kind in RESNET_BLOCKS:
            (downsampler,) = _resnets(config, kind, [(n_out, n_out)], layers, resample="down")
        else:
            downsampler = Downsample(n_out, layers=layers, padding=config.downsample_padding)
    return DownBlock2D(_resnets(config, kind, widths, layers), mixers, downsampler)


def make_mid_block(config: UNet2DConditionConfig, *, layers: LayerFactory) -> MidBlock2D | None:
    """The middle block, at the lowest resolution, if there is one."""
    kind = config.mid_block_type
    if kind is None:
        return None
    block = len(config.block_out_channels) - 1
    width = config.block_out_channels[block]
    mixers = _attention_layers(
        config,
        kind,
        block,
        1,
        config.per_block("transformer_layers_per_block")[block],
        layers,
        head_width=config.per_block("attention_head_dim")[block],
        only_cross_attention=config.mid_block_is_only_cross_attention,
    )
    # The kind without cross-attention is a single residual block.
    count = 2 if mixers else 1
    widths, scale = [(width, width)] * count, config.mid_block_scale_factor
    return MidBlock2D(_resnets(config, kind, widths, layers, output_scale=scale), mixers)


def make_mid_block_without_text(config: UNet2DConfig, *, layers: LayerFactory) -> MidBlock2D | None:
    """The middle block of a UNet2DModel: self-attention or none between residual blocks."""
    if config.mid_block_type is None:
        return None
    width, scale = config.block_out_channels[-1], config.mid_block_scale_factor
    resnets = _resnets(
        config.conditional,
        config.mid_block_type,
        [(width, width)] * 2,
        layers,
        output_scale=scale,
    )
    if not config.add_attention:
        return MidBlock2D(resnets)
    attention = SpatialSelfAttention(
        width,
        layers=layers,
        heads=width // (config.attention_head_dim),
        groups=config.attn_norm_num_groups or config.norm_num_groups,
        eps=config.norm_eps,
    )
    return MidBlock2D(resnets, [attention])


def make_up_block(config: UNet2DConditionConfig, index: int, *, layers: LayerFactory) -> UpBlock2D:
    """Up block number `index`, counted from the lowest resolution."""
    channels, kind = config.block_out_channels, config.up_block_types[index]
    block = len(channels) - 1 - index  # the down block of the same resolution
    n_out = channels[block]
    below = channels[min(block + 1, len(channels) - 1)]
    above = channels[max(block - 1, 0)]
    count = config.per_block("layers_per_block")[block] + 1
    if config.reverse_transformer_layers_per_block is None:
        depth = config.per_block("transformer_layers_per_block")[block]
    else:
        depth = config.reverse_transformer_layers_per_block[index]
    mixers = _attention_layers(
        config,
        kind,
        block,
        count,
        depth,
        layers,
        # diffusers does not reverse this list on the way up; for an int there is no difference.
        head_width=config.per_block("attention_head_dim")[index],
        only_cross_attention=config.per_block("only_cross_attention")[block],
    )
    widths = [
        ((below if i == 0 else n_out) + (above if i == count - 1 else n_out), n_out)
        for i in range(count)
    ]
    upsampler = None
    if block > 0:
        if kind in RESNET_BLOCKS:
            (upsampler,) = _resnets(config, kind, [(n_out, n_out)], layers, resample="up")
        else:
            upsampler = Upsample(n_out, layers=layers)
    return UpBlock2D(_resnets(config, kind, widths, layers), mixers, upsampler)
