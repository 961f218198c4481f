"""A classifier of noisy latents and their noise level, for classifier guidance (2105.05233).

The way down of a UNet, then attention pooling with one query for each group of attributes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.core.validate import check_shape, positive
from jaxdiff.models.attributes import LabelGroup, LabelSet
from jaxdiff.nn.embeddings import TimestepEmbedding, sinusoidal
from jaxdiff.nn.initializers import ZEROS, Normal
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.resnet import Downsample, ResnetBlock
from jaxdiff.nn.transformer import Attention, SpatialSelfAttention
from jaxdiff.nn.unet_2d_blocks import DownBlock2D

EPS = 1e-5  # of every norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentClassifierConfig:
    """Sizes of the network, and its labels: name, labels and kind of each group."""

    sample_size: int = 8  # rows and columns of the latents, which have to be square
    in_channels: int = 16
    block_out_channels: tuple[int, ...] = (64, 128)  # each after the first at half the resolution
    layers_per_block: int = 2  # residual blocks of a resolution, self-attention after each
    attention_head_dim: int = 32  # width of a head
    norm_num_groups: int = 16
    group_names: tuple[str, ...] = ("class",)
    group_labels: tuple[tuple[str, ...], ...] = (("no", "yes"),)
    group_exclusive: tuple[bool, ...] = (True,)  # exactly one label is right, or any number

    def __post_init__(self) -> None:
        """Refuse what LatentClassifier cannot do."""
        for name in ("in_channels", "layers_per_block", "attention_head_dim", "norm_num_groups"):
            positive(name, getattr(self, name))
        if not self.block_out_channels:
            raise InputError("block_out_channels: got none, expected a width for each resolution")
        step = 2 ** (len(self.block_out_channels) - 1)
        if self.sample_size < 1 or self.sample_size % step:
            raise InputError(f"sample_size: got {self.sample_size}, expected a multiple of {step}")
        for name in ("group_labels", "group_exclusive"):
            if len(getattr(self, name)) != len(self.group_names):
                raise InputError(
                    f"{name}: got {len(getattr(self, name))}, expected {len(self.group_names)} "
                    "as there are group_names"
                )
        LabelSet(self._groups())

    def _groups(self) -> tuple[LabelGroup, ...]:
        rows = zip(self.group_names, self.group_labels, self.group_exclusive, strict=True)
        return tuple(LabelGroup(name=n, labels=labels, exclusive=e) for n, labels, e in rows)

    @functools.cached_property
    def attributes(self) -> LabelSet:
        """The groups that the logits belong to."""
        return LabelSet(self._groups())

    def with_labels(self, attributes: LabelSet) -> "LatentClassifierConfig":
        """The same sizes for other groups."""
        return dataclasses.replace(
            self,
            group_names=tuple(group.name for group in attributes.groups),
            group_labels=tuple(group.labels for group in attributes.groups),
            group_exclusive=tuple(group.exclusive for group in attributes.groups),
        )


def _down_block(config: LatentClassifierConfig, block: int, layers: LayerFactory) -> DownBlock2D:
    """Residual blocks with attention at one resolution, and a downsampling unless it is the last.

    The noise level scales and shifts after the second norm, as in the classifier of 2105.05233.
    """
    widths = config.block_out_channels
    n_in, n_out = widths[max(block - 1, 0)], widths[block]
    groups = config.norm_num_groups
    resnets = [
        ResnetBlock(
            n_in if i == 0 else n_out,
            n_out,
            layers=layers,
            groups=groups,
            eps=EPS,
            act="silu",
            time_width=4 * widths[0],
            scale_shift=True,
            zero_init=True,
        )
        for i in range(config.layers_per_block)
    ]
    heads = n_out // config.attention_head_dim
    attentions = [
        SpatialSelfAttention(n_out, layers=layers, heads=heads, groups=groups, eps=EPS)
        for _ in resnets
    ]
    last = block == len(widths) - 1
    return DownBlock2D(
        resnets, attentions, None if last else Downsample(n_out, layers=layers, padding=1)
    )


class LatentClassifier(nnx.Module):
    """Noisy latents and their noise level to the logits of attributes."""

    def __init__(
        self,
        config: LatentClassifierConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        first, last = config.block_out_channels[0], config.block_out_channels[-1]
        side = config.sample_size // 2 ** (len(config.block_out_channels) - 1)
        self.config = config
        self.dtype = dtype
        self.conv_in = layers.conv(config.in_channels, first, 3)
        self.time_embedding = TimestepEmbedding(first, 4 * first, layers=layers)
        self.down_blocks = nnx.List(
            _down_block(config, i, layers) for i in range(len(config.block_out_channels))
        )
        self.norm = layers.group_norm(last, groups=config.norm_num_groups, eps=EPS)
        self.positions = layers.param(Normal(0.5), (side * side, last))
        self.queries = layers.param(Normal(1.0), (len(config.group_names), last))
        self.pool = Attention(
            last,
            layers=layers,
            heads=last // config.attention_head_dim,
            context_width=last,
            qkv_bias=True,
        )
        self.norm_out = layers.layer_norm(last)
        # All answers are equally likely at first.
        self.heads = nnx.List(
            layers.linear(last, len(labels), init=ZEROS) for labels in config.group_labels
        )

    def __call__(
        self, sample: Float[Array, "b h w c"], timesteps: Float[Array, "b"] | Int[Array, "b"]
    ) -> Float[Array, "b n"]:
        """Logits in float32, group after group as `config.attributes` says.

        `sample` is x_t = alpha x_0 + sigma eps of scaled latents, `timesteps` count the steps of
        the training schedule. InputError for latents of another shape than the config's.
        """
        config = self.config
        check_shape(
            "sample", sample, (None, config.sample_size, config.sample_size, config.in_channels)
        )
        sines = sinusoidal(timesteps, config.block_out_channels[0])
        time = self.time_embedding(sines)
        x = self.conv_in(sample.astype(self.dtype))
        for block in self.down_blocks:
            x = block(x, time)[-1]
        tokens = jax.nn.silu(self.norm(x)).reshape(len(x), -1, x.shape[-1])
        tokens = tokens + self.positions[...].astype(self.dtype)[None]
        queries = self.queries[...].astype(self.dtype)[None]
        pooled = self.pool(jnp.broadcast_to(queries, (len(x), *queries.shape[1:])), tokens)
        pooled = jax.nn.silu(self.norm_out(pooled))
        logits = [head(pooled[:, i]) for i, head in enumerate(self.heads)]
        return jnp.concatenate(logits, axis=-1).astype(jnp.float32)
