"""Layers of a decoder whose norms take the latents, with diffusers' parameter names.

MoVQ (2209.09002): each group norm is scaled and shifted by functions of the latent at that place,
so that neighbours with the same code need not be decoded alike.
"""

from flax import nnx

from jaxdiff.core.types import Array, Float
from jaxdiff.nn.activations import activation
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.remat import remat
from jaxdiff.nn.resnet import resize_nearest
from jaxdiff.nn.transformer import Attention

GROUPS, EPS = 32, 1e-6  # fixed by diffusers in code, whatever the config's norm_num_groups


class SpatialNorm(nnx.Module):
    """GroupNorm(x) y(z) + b(z), where y and b are 1x1 convolutions of the latents.

    InputError unless 32 divides the channels.
    """

    def __init__(self, channels: int, latent_channels: int, *, layers: LayerFactory):
        self.norm_layer = layers.group_norm(channels, groups=GROUPS, eps=EPS)
        self.conv_y = layers.conv(latent_channels, channels, 1)
        self.conv_b = layers.conv(latent_channels, channels, 1)

    def __call__(
        self, x: Float[Array, "b h w c"], latents: Float[Array, "b h2 w2 z"]
    ) -> Float[Array, "b h w c"]:
        """The norm of x, by the latents resized to its resolution."""
        latents = resize_nearest(latents, (x.shape[1], x.shape[2]))
        return self.norm_layer(x) * self.conv_y(latents) + self.conv_b(latents)


class SpatialNormResnetBlock(nnx.Module):
    """norm, act, conv, norm, act, conv, + input, the norms by the latents."""

    def __init__(
        self, n_in: int, n_out: int, *, layers: LayerFactory, latent_channels: int, act: str
    ):
        self.norm1 = SpatialNorm(n_in, latent_channels, layers=layers)
        self.conv1 = layers.conv(n_in, n_out, 3)
        self.norm2 = SpatialNorm(n_out, latent_channels, layers=layers)
        self.conv2 = layers.conv(n_out, n_out, 3)
        self.conv_shortcut = None if n_in == n_out else layers.conv(n_in, n_out, 1)
        self.act = act
        self.remat = layers.remat

    @remat
    def __call__(
        self, x: Float[Array, "b h w i"], latents: Float[Array, "b h2 w2 z"]
    ) -> Float[Array, "b h w o"]:
        """Apply the block."""
        act = activation(self.act)
        h = self.conv1(act(self.norm1(x, latents)))
        h = self.conv2(act(self.norm2(h, latents)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialNormSelfAttention(Attention):
    """Self-attention between pixels after a norm by the latents, added to the input."""

    def __init__(self, channels: int, *, layers: LayerFactory, latent_channels: int):
        super().__init__(channels, layers=layers, heads=1, qkv_bias=True)
        self.spatial_norm = SpatialNorm(channels, latent_channels, layers=layers)
        self.remat = layers.remat

    @remat
    def __call__(
        self, x: Float[Array, "b h w c"], latents: Float[Array, "b h2 w2 z"]
    ) -> Float[Array, "b h w c"]:
        """x + attention(norm(x)) over all pixels."""
        tokens = self.spatial_norm(x, latents).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(tokens).reshape(x.shape)
