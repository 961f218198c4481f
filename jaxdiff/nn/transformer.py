"""Attention and transformer blocks of the UNet and the VAE, with diffusers' parameter names."""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float
from jaxdiff.nn.activations import activation, gated_gelu
from jaxdiff.nn.attention import attention
from jaxdiff.nn.initializers import ZEROS, Initializer
from jaxdiff.nn.layers import LayerFactory, Placeholder
from jaxdiff.nn.remat import remat


def split_heads(x: Float[Array, "b n c"], heads: int) -> Float[Array, "b n {heads} d"]:
    """The channels of each token, cut into `heads` equal runs."""
    return x.reshape(*x.shape[:2], heads, -1)


class Attention(nnx.Module):
    """Multi-head attention over `context` tokens, or over the input itself without one."""

    def __init__(
        self,
        width: int,
        *,
        layers: LayerFactory,
        heads: int,
        context_width: int | None = None,
        qkv_bias: bool = False,
        out_init: Initializer | None = None,
    ):
        if heads < 1 or width % heads:
            raise InputError(f"attention heads: got {heads}, expected a divisor of width {width}")
        source = width if context_width is None else context_width
        self.to_q = layers.linear(width, width, bias=qkv_bias)
        self.to_k = layers.linear(source, width, bias=qkv_bias)
        self.to_v = layers.linear(source, width, bias=qkv_bias)
        self.to_out = nnx.List([layers.linear(width, width, init=out_init)])
        self.heads = heads
        self.backend = layers.attention

    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Float[Array, "b m e"] | None = None,
        *,
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Mix tokens; no residual is added. Where `perturbed`, each token sees itself alone."""
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        out = attention(*(split_heads(t, self.heads) for t in (q, k, v)), backend=self.backend)
        out = out.reshape(x.shape)
        if perturbed is not None:
            out = jnp.where(perturbed[:, None, None], v, out)
        return self.to_out[0](out)


class SpatialSelfAttention(Attention):
    """Group norm and self-attention between pixels, added to the input (VAE and plain UNets)."""

    def __init__(self, channels: int, *, layers: LayerFactory, heads: int, groups: int, eps: float):
        super().__init__(channels, layers=layers, heads=heads, qkv_bias=True)
        self.group_norm = layers.group_norm(channels, groups=groups, eps=eps)
        self.remat = layers.remat

    @remat
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x + attention(norm(x)) over all pixels."""
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(tokens).reshape(x.shape)


class GEGLU(nnx.Module):
    """a gelu(b), where a and b are halves of one linear layer (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, *, layers: LayerFactory):
        self.proj = layers.linear(width, 2 * inner)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n i"]:
        """Apply the gated layer."""
        value, gate = self.proj.split_outputs(x)
        return gated_gelu(value, gate)


class ProjectedActivation(nnx.Module):
    """An activation function of one linear layer."""

    def __init__(self, width: int, inner: int, *, layers: LayerFactory, act: str):
        self.proj = layers.linear(width, inner)
        self.act = act

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n i"]:
        """Apply the layer and the function."""
        return activation(self.act)(self.proj(x))


class FeedForward(nnx.Module):
    """The two-layer perceptron of a transformer block, four times as wide inside.

    `act` is "geglu", or the name of an activation function without a gate.
    """

    def __init__(self, width: int, *, layers: LayerFactory, act: str = "geglu"):
        inner = 4 * width
        first = (
            GEGLU(width, inner, layers=layers)
            if act == "geglu"
            else ProjectedActivation(width, inner, layers=layers, act=act)
        )
        self.net = nnx.List([first, Placeholder(), layers.linear(inner, width)])

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Apply the perceptron; no residual is added."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each a residual after a layer norm.

    With `only_cross_attention` the first attention is over the context, too.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: LayerFactory,
        heads: int,
        context_width: int,
        only_cross_attention: bool = False,
    ):
        first_width = context_width if only_cross_attention else None
        self.norm1 = layers.layer_norm(width)
        self.attn1 = Attention(width, layers=layers, heads=heads, context_width=first_width)
        self.norm2 = layers.layer_norm(width)
        self.attn2 = Attention(width, layers=layers, heads=heads, context_width=context_width)
        self.norm3 = layers.layer_norm(width)
        self.ff = FeedForward(width, layers=layers)
        self.only_cross_attention = only_cross_attention
        self.remat = layers.remat

    @remat
    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Float[Array, "b m e"] | None,
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Apply the block; without a context both attentions are over x."""
        first = context if self.only_cross_attention else None
        x = x + self.attn1(self.norm1(x), first, perturbed=perturbed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, appendix E).

    `linear` makes the projections in and out linear layers instead of 1x1 convolutions: the same
    function, stored in another shape. The projection out starts at zero.
    """

    def __init__(
        self,
        channels: int,
        *,
        layers: LayerFactory,
        heads: int,
        context_width: int,
        depth: int,
        groups: int,
        linear: bool,
        only_cross_attention: bool = False,
    ):
        self.norm = layers.group_norm(channels, groups=groups, eps=1e-6)
        if linear:
            self.proj_in = layers.linear(channels, channels)
            self.proj_out = layers.linear(channels, channels, init=ZEROS)
        else:
            self.proj_in = layers.conv(channels, channels, 1)
            self.proj_out = layers.conv(channels, channels, 1, init=ZEROS)
        self.transformer_blocks = nnx.List(
            TransformerBlock(
                channels,
                layers=layers,
                heads=heads,
                context_width=context_width,
                only_cross_attention=only_cross_attention,
            )
            for _ in range(depth)
        )

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b m e"] | None,
        perturbed: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """x + the transformer's output for x; self-attention is off where `perturbed`."""
        tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            tokens = block(tokens, context, perturbed)
        return x + self.proj_out(tokens.reshape(x.shape))
