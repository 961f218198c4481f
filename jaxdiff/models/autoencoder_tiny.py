"""AutoencoderTiny: TAESD, a small distilled VAE for previews and fast decoding.

It has no Gaussian: an image has one latent, already of the scale that the diffusion model sees.
Inside, images are in [0, 1].
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float
from jaxdiff.core.validate import check_shape, one_of, positive
from jaxdiff.models.latent_codec import SpatialCodec, check_images
from jaxdiff.nn.activations import ACTIVATIONS, activation
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.resnet import resize_nearest

LATENT_LIMIT = 3.0  # latents beyond it are softly limited before they are decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig:
    """The fields of a diffusers AutoencoderTiny config.json, with its defaults."""

    NO_EFFECT: ClassVar[Mapping[str, str]] = {
        "latent_magnitude": "of latents stored in bytes",
        "latent_shift": "of latents stored in bytes",
        "force_upcast": "float16 does not overflow in it",
    }

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)  # all the same
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)  # from the image's resolution downwards
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)  # from the latents' resolution upwards
    latent_magnitude: float = 3  # of latents stored in bytes; informative
    latent_shift: float = 0.5  # likewise
    force_upcast: bool = False  # float16 does not overflow in this VAE
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what AutoencoderTiny cannot do."""
        for half in ("encoder", "decoder"):
            channels = getattr(self, f"{half}_block_out_channels")
            blocks = getattr(self, f"num_{half}_blocks")
            if len(channels) != len(blocks):
                raise InputError(
                    f"{half}_block_out_channels: got {len(channels)} stages, expected "
                    f"{len(blocks)} as num_{half}_blocks has"
                )
            if len(set(channels)) != 1:
                raise InputError(
                    f"{half}_block_out_channels: got {channels}, expected one number for all stages"
                )
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise InputError(
                f"num_decoder_blocks: got {len(self.num_decoder_blocks)} stages, expected "
                f"{len(self.num_encoder_blocks)} as the encoder has"
            )
        one_of("act_fn", self.act_fn, ACTIVATIONS)
        one_of("upsample_fn", self.upsample_fn, ["nearest"])
        one_of("upsampling_scaling_factor", self.upsampling_scaling_factor, [2])
        for name in ("in_channels", "out_channels", "latent_channels"):
            positive(name, getattr(self, name))
        positive("scaling_factor", self.scaling_factor)

    @property
    def downscale(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.num_encoder_blocks) - 1)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, a layer without weights."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Double the resolution."""
        return resize_nearest(x, (2 * x.shape[1], 2 * x.shape[2]))


class Activation(nnx.Module):
    """An activation by name, a layer without weights."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Apply it."""
        return activation(self.name)(x)


class AutoencoderTinyBlock(nnx.Module):
    """Three 3x3 convolutions, + input, ReLU."""

    def __init__(self, channels: int, act: str, *, layers: LayerFactory):
        def conv() -> nnx.Module:
            return layers.conv(channels, channels, 3)

        self.conv = nnx.List([conv(), Activation(act), conv(), Activation(act), conv()])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Apply the block."""
        return activation("relu")(_apply(self.conv, x) + x)


def _apply(layers: Iterable[nnx.Module], x: Array) -> Array:
    for layer in layers:
        x = layer(x)  # pyright: ignore[reportCallIssue]
    return x


class EncoderTiny(nnx.Module):
    """Images in [-1, 1] to latents."""

    def __init__(self, config: AutoencoderTinyConfig, *, layers: LayerFactory):
        channels = config.encoder_block_out_channels[0]
        made: list[nnx.Module] = []
        for i, blocks in enumerate(config.num_encoder_blocks):
            if i == 0:
                made.append(layers.conv(config.in_channels, channels, 3))
            else:
                made.append(layers.conv(channels, channels, 3, stride=2, bias=False))
            made += [
                AutoencoderTinyBlock(channels, config.act_fn, layers=layers) for _ in range(blocks)
            ]
        made.append(layers.conv(channels, config.latent_channels, 3))
        self.layers = nnx.List(made)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 z"]:
        """The latents."""
        return _apply(self.layers, (x + 1) / 2)


class DecoderTiny(nnx.Module):
    """Latents to images, about [-1, 1], in float32."""

    def __init__(self, config: AutoencoderTinyConfig, *, layers: LayerFactory):
        channels, act = config.decoder_block_out_channels[0], config.act_fn
        made: list[nnx.Module] = [
            layers.conv(config.latent_channels, channels, 3),
            Activation(act),
        ]
        for blocks in config.num_decoder_blocks[:-1]:
            made += [AutoencoderTinyBlock(channels, act, layers=layers) for _ in range(blocks)]
            made += [Upsample(), layers.conv(channels, channels, 3, bias=False)]
        for _ in range(config.num_decoder_blocks[-1]):
            made.append(AutoencoderTinyBlock(channels, act, layers=layers))
        made.append(layers.conv(channels, config.out_channels, 3))
        self.layers = nnx.List(made)

    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """The images."""
        limited = jnp.tanh(z / LATENT_LIMIT) * LATENT_LIMIT
        return 2 * _apply(self.layers, limited).astype(jnp.float32) - 1


class AutoencoderTiny(SpatialCodec):
    """The VAE: images in [-1, 1] to and from latents of 1/downscale the resolution."""

    def __init__(
        self,
        config: AutoencoderTinyConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        self.config = config
        self.encoder = EncoderTiny(config, layers=layers)
        self.decoder = DecoderTiny(config, layers=layers)

    def encode(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 z"], None]:
        """The unscaled latents, in float32.

        InputError unless height and width are multiples of `config.downscale`.
        """
        check_images(images, self.config.in_channels, self.config.downscale)
        return self.encoder(images).astype(jnp.float32), None

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Images, about [-1, 1] and not clipped, in float32, of unscaled latents."""
        check_shape("latents", z, (None, None, None, self.config.latent_channels))
        return self.decoder(z)

    def scale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """Unscaled latents to what the diffusion model sees: the same, but for the config."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """The inverse of `scale`."""
        return z / self.config.scaling_factor + self.config.shift_factor
