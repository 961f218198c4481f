"""Runs of residual blocks at one resolution: the way down, the middle and the way up of a UNet.

The VAE's encoder and decoder are the same stages without time, context and skip connections.
A stage's `attentions` list is None or has one module for each residual block (the middle: between
them); what a stage consists of is decided by the model that builds it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float
from jaxdiff.nn.added_kv_attention import AddedKVAttention
from jaxdiff.nn.resnet import Downsample, ResnetBlock, Upsample
from jaxdiff.nn.transformer import SpatialSelfAttention, SpatialTransformer

AttentionLayer = SpatialSelfAttention | SpatialTransformer | AddedKVAttention
Image = Float[Array, "b h w c"]
Time = Float[Array, "b e"] | None
Context = Float[Array, "b n d"] | None
ContextMask = Bool[Array, "b n"] | None
Perturbed = Bool[Array, "b"] | None


def apply_attention(
    layer: AttentionLayer,
    x: Image,
    context: Context,
    context_mask: ContextMask = None,
    perturbed: Perturbed = None,
) -> Image:
    """Apply any kind of attention; only a transformer's can be perturbed."""
    if isinstance(layer, SpatialTransformer):
        return layer(x, context, perturbed)
    if isinstance(layer, SpatialSelfAttention):
        return layer(x)
    if context is None:
        raise InputError("context: got none, expected an array")
    return layer(x, context, context_mask)


def apply_resampling(
    layer: Downsample | Upsample | ResnetBlock,
    x: Image,
    time: Time,
    size: tuple[int, int] | None = None,
) -> Float[Array, "b h2 w2 c"]:
    """Change the resolution; only an upsampling without a residual block takes a `size`."""
    if isinstance(layer, ResnetBlock):
        return layer(x, time)
    return layer(x, size) if isinstance(layer, Upsample) else layer(x)


class DownBlock2D(nnx.Module):
    """Residual blocks, then perhaps a downsampling."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[AttentionLayer] | None = None,
        downsampler: Downsample | ResnetBlock | None = None,
    ):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions) if attentions else None
        self.downsamplers = nnx.List([downsampler]) if downsampler else None

    def __call__(
        self,
        x: Image,
        time: Time = None,
        context: Context = None,
        context_mask: ContextMask = None,
    ) -> list[Array]:
        """The feature maps after each block and after the downsampling, the last one to go on."""
        states = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions is not None:
                x = apply_attention(self.attentions[i], x, context, context_mask)
            states.append(x)
        if self.downsamplers is not None:
            states.append(apply_resampling(self.downsamplers[0], x, time))
        return states


class MidBlock2D(nnx.Module):
    """Residual blocks with attention between them."""

    def __init__(
        self, resnets: Sequence[ResnetBlock], attentions: Sequence[AttentionLayer] | None = None
    ):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions) if attentions else None

    def __call__(
        self,
        x: Image,
        time: Time = None,
        context: Context = None,
        context_mask: ContextMask = None,
        perturbed: Perturbed = None,
    ) -> Array:
        """The feature map after all blocks, of the same shape."""
        x = self.resnets[0](x, time)
        for i, resnet in enumerate(list(self.resnets)[1:]):
            if self.attentions is not None:
                x = apply_attention(self.attentions[i], x, context, context_mask, perturbed)
            x = resnet(x, time)
        return x


class UpBlock2D(nnx.Module):
    """Residual blocks, each on its input joined with a skip connection, then perhaps upsampling."""

    def __init__(
        self,
        resnets: Sequence[ResnetBlock],
        attentions: Sequence[AttentionLayer] | None = None,
        upsampler: Upsample | ResnetBlock | None = None,
    ):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions) if attentions else None
        self.upsamplers = nnx.List([upsampler]) if upsampler else None

    def __call__(
        self,
        x: Image,
        time: Time = None,
        context: Context = None,
        context_mask: ContextMask = None,
        *,
        skips: Sequence[Array] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Array:
        """Take `skips` from the end, one for each block; upsample to `size`, by default double."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x if skips is None else jnp.concatenate([x, skips[-1 - i]], -1), time)
            if self.attentions is not None:
                x = apply_attention(self.attentions[i], x, context, context_mask)
        if self.upsamplers is None:
            return x
        return apply_resampling(self.upsamplers[0], x, time, size)
