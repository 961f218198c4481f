"""AutoencoderKL, the convolutional VAE of latent diffusion (Rombach et al. 2022, appendix G)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float
from jaxdiff.core.validate import check_shape, one_of, positive
from jaxdiff.models.latent_codec import SpatialCodec, check_images
from jaxdiff.nn.activations import ACTIVATIONS, activation
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.resnet import Downsample, ResnetBlock, Upsample
from jaxdiff.nn.transformer import SpatialSelfAttention
from jaxdiff.nn.unet_2d_blocks import DownBlock2D, MidBlock2D, UpBlock2D

EPS = 1e-6  # of every norm; diffusers fixes it in code, not in the config
LOGVAR_RANGE = (-30.0, 20.0)
# The stages of encoder and decoder, and whether attention follows each of their residual blocks.
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """The fields of a diffusers AutoencoderKL config.json, with its defaults."""

    NO_EFFECT: ClassVar[Mapping[str, str]] = {
        "sample_size": "tiles have a size of their own",
    }

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)  # from the image's resolution downwards
    layers_per_block: int = 1  # residual blocks a stage; the decoder has one more
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32  # of the training images, in pixels; informative
    scaling_factor: float = 0.18215  # brings latents to unit variance
    shift_factor: float | None = None  # taken from latents before scaling; None is 0
    # of each channel; latents are (z - mean) scaling_factor / std where they are given
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True  # float16 overflows in this VAE: decode it in a wider dtype
    use_quant_conv: bool = True  # a 1x1 convolution after the encoder
    use_post_quant_conv: bool = True  # a 1x1 convolution before the decoder
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        """Refuse what AutoencoderKL cannot do."""
        stages = len(self.block_out_channels)
        for name, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            types = getattr(self, name)
            if len(types) != stages:
                raise InputError(f"{name}: got {len(types)} blocks, expected {stages}")
            for block in types:
                one_of(name, block, kinds)
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        for name in ("in_channels", "out_channels", "layers_per_block", "latent_channels"):
            positive(name, getattr(self, name))
        positive("scaling_factor", self.scaling_factor)
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.latent_channels:
                raise InputError(
                    f"{name}: got {len(value)} numbers, expected one for each of "
                    f"{self.latent_channels} channels"
                )
        if (self.latents_mean is None) != (self.latents_std is None):
            raise InputError("latents_mean, latents_std: got one of them, expected both or none")
        if self.latents_mean is not None and self.shift_factor:
            raise InputError(
                f"shift_factor: got {self.shift_factor} with latents_mean, expected null"
            )

    @property
    def downscale(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)


def _resnets(config: AutoencoderKLConfig, n_in: int, n_out: int, count: int, layers: LayerFactory):
    return [
        ResnetBlock(
            n_in if i == 0 else n_out,
            n_out,
            layers=layers,
            groups=config.norm_num_groups,
            eps=EPS,
            act=config.act_fn,
        )
        for i in range(count)
    ]


def _attentions(config: AutoencoderKLConfig, channels: int, count: int, layers: LayerFactory):
    groups = config.norm_num_groups
    return [
        SpatialSelfAttention(channels, layers=layers, heads=1, groups=groups, eps=EPS)
        for _ in range(count)
    ]


def _mid(config: AutoencoderKLConfig, layers: LayerFactory) -> MidBlock2D:
    c = config.block_out_channels[-1]
    attentions = _attentions(config, c, int(config.mid_block_add_attention), layers)
    return MidBlock2D(_resnets(config, c, c, 2, layers), attentions)


class Encoder(nnx.Module):
    """Image to the parameters of a diagonal Gaussian over latents, or to so many `outputs`."""

    def __init__(
        self, config: AutoencoderKLConfig, *, layers: LayerFactory, outputs: int | None = None
    ):
        channels = config.block_out_channels
        self.conv_in = layers.conv(config.in_channels, channels[0], 3)
        self.down_blocks = nnx.List()
        for i, (n_in, n_out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            last, count = i == len(channels) - 1, config.layers_per_block
            attentions = count if DOWN_BLOCKS[config.down_block_types[i]] else 0
            self.down_blocks.append(
                DownBlock2D(
                    _resnets(config, n_in, n_out, count, layers),
                    _attentions(config, n_out, attentions, layers),
                    downsampler=None if last else Downsample(n_out, layers=layers, padding=0),
                )
            )
        self.mid_block = _mid(config, layers)
        self.conv_norm_out = layers.group_norm(channels[-1], groups=config.norm_num_groups, eps=EPS)
        self.conv_out = layers.conv(channels[-1], outputs or 2 * config.latent_channels, 3)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z"]:
        """Mean and log-variance, joined along the channels, or the outputs."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)[-1]
        # diffusers ends both halves with SiLU, whatever act_fn says.
        return self.conv_out(activation("silu")(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to image."""

    def __init__(self, config: AutoencoderKLConfig, *, layers: LayerFactory):
        channels = config.block_out_channels[::-1]
        self.conv_in = layers.conv(config.latent_channels, channels[0], 3)
        self.mid_block = _mid(config, layers)
        self.up_blocks = nnx.List()
        for i, (n_in, n_out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            last, count = i == len(channels) - 1, config.layers_per_block + 1
            attentions = count if UP_BLOCKS[config.up_block_types[i]] else 0
            self.up_blocks.append(
                UpBlock2D(
                    _resnets(config, n_in, n_out, count, layers),
                    _attentions(config, n_out, attentions, layers),
                    upsampler=None if last else Upsample(n_out, layers=layers),
                )
            )
        self.conv_norm_out = layers.group_norm(channels[-1], groups=config.norm_num_groups, eps=EPS)
        self.conv_out = layers.conv(channels[-1], config.out_channels, 3)

    def features(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 d"]:
        """What the last layer, `conv_out`, makes the image of."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return activation("silu")(self.conv_norm_out(x))

    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """The decoded image."""
        return self.conv_out(self.features(z))


class AutoencoderKL(SpatialCodec):
    """The VAE: images in [-1, 1] to and from latents of 1/downscale the resolution."""

    def __init__(
        self,
        config: AutoencoderKLConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, layers=layers)
        self.decoder = Decoder(config, layers=layers)
        self.quant_conv = layers.conv(2 * z, 2 * z, 1) if config.use_quant_conv else None
        self.post_quant_conv = layers.conv(z, z, 1) if config.use_post_quant_conv else None

    def encode(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
        """Mean and log-variance (limited to [-30, 20]) of the unscaled latents, in float32.

        InputError unless height and width are multiples of `config.downscale`.
        """
        check_images(images, self.config.in_channels, self.config.downscale)
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Images, about [-1, 1] and not clipped, in float32, of unscaled latents."""
        return self.decoder.conv_out(self.decoder_features(z)).astype(jnp.float32)

    def decoder_features(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 d"]:
        """What the decoder's last layer, `decoder.conv_out`, makes images of."""
        check_shape("latents", z, (None, None, None, self.config.latent_channels))
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder.features(z)

    def scale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """Unscaled latents to what the diffusion model sees, about unit variance."""
        config = self.config
        if config.latents_mean is not None:
            mean, std = self._moments()
            return (z - mean) * (config.scaling_factor / std)
        return (z - (config.shift_factor or 0.0)) * config.scaling_factor

    def unscale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """The inverse of `scale`."""
        config = self.config
        if config.latents_mean is not None:
            mean, std = self._moments()
            return z * (std / config.scaling_factor) + mean
        return z / config.scaling_factor + (config.shift_factor or 0.0)

    def _moments(self) -> tuple[Float[Array, "1 1 1 z"], Float[Array, "1 1 1 z"]]:
        """The mean and the standard deviation of each channel of the latents."""
        mean, std = (
            jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std


def sample_latents(
    mean: Float[Array, "b *d"], logvar: Float[Array, "b *d"], noise: Float[Array, "b *d"]
) -> Float[Array, "b *d"]:
    """z = mean + exp(logvar / 2) noise (1312.6114, eq. 10)."""
    return mean + jnp.exp(0.5 * logvar) * noise
