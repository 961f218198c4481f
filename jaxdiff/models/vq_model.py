"""VQModel, the autoencoder of latent diffusion whose latents are vectors of a codebook.

VQGAN (2012.09841) with the quantisation in the decoder, so that a diffusion model sees the
continuous latents before it (2112.10752, section 3.1). With spatial norms it is Kandinsky's MoVQ
(2209.09002), whose decoder sees the latents at every norm.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.core.validate import check_shape, positive
from jaxdiff.models.latent_codec import SpatialCodec, check_images
from jaxdiff.models.vae import UP_BLOCKS, AutoencoderKLConfig, Decoder, Encoder
from jaxdiff.nn import spatial_norm
from jaxdiff.nn.activations import activation
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.resnet import Upsample
from jaxdiff.nn.spatial_norm import SpatialNorm, SpatialNormResnetBlock, SpatialNormSelfAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQModelConfig:
    """The fields of a diffusers VQModel config.json, with its defaults."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "norm_type": ("group", "spatial"),
        "lookup_from_codebook": (False,),
    }
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
    latent_channels: int = 3
    sample_size: int = 32  # of the training images, in pixels; informative
    num_vq_embeddings: int = 256  # vectors of the codebook
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None  # width of a vector: latent_channels, which None means
    scaling_factor: float = 0.18215  # brings latents to unit variance; unused with spatial norms
    norm_type: str = "group"  # of the decoder; "spatial": by the latents, which are not quantised
    mid_block_add_attention: bool = True
    lookup_from_codebook: bool = False
    force_upcast: bool = False  # float16 overflows in this VAE: decode it in a wider dtype

    def __post_init__(self) -> None:
        """Refuse what VQModel here cannot do."""
        check_unsupported(self)
        positive("num_vq_embeddings", self.num_vq_embeddings)
        _ = self.layers  # checks the others
        if self.vq_embed_dim not in (None, self.latent_channels):
            raise InputError(
                f"vq_embed_dim: got {self.vq_embed_dim}, expected latent_channels, "
                f"{self.latent_channels}"
            )
        narrow = [c for c in self.block_out_channels if c % spatial_norm.GROUPS]
        if self.has_spatial_norms and narrow:
            raise InputError(
                f"block_out_channels: got {narrow[0]} with spatial norms, expected multiples of "
                f"{spatial_norm.GROUPS}"
            )

    @property
    def has_spatial_norms(self) -> bool:
        """Whether the decoder's norms take the latents, as MoVQ's do."""
        return self.norm_type == "spatial"

    @property
    def downscale(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def layers(self) -> AutoencoderKLConfig:
        """The config of encoder and decoder, which are those of AutoencoderKL."""
        names = {field.name for field in dataclasses.fields(AutoencoderKLConfig)}
        fields = {field.name for field in dataclasses.fields(self)} & names
        return AutoencoderKLConfig(**{name: getattr(self, name) for name in fields})


class VectorQuantizer(nnx.Module):
    """A codebook: vectors, of which each latent becomes the nearest."""

    def __init__(self, vectors: int, width: int, *, layers: LayerFactory):
        self.embedding = layers.embed(vectors, width, std=1 / vectors)

    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """The nearest vectors, in float32; gradients go on to z as they are (1711.00937)."""
        z = z.astype(jnp.float32)
        table = self.embedding.embedding[...].astype(jnp.float32)
        nearest = jnp.take(table, self.indices(z), axis=0)
        return z + lax.stop_gradient(nearest - z)

    def indices(self, z: Float[Array, "b h w z"]) -> Int[Array, "b h w"]:
        """The number of the vector that is nearest to each latent."""
        table = self.embedding.embedding[...].astype(jnp.float32)
        lengths = jnp.square(table).sum(axis=1)[None, None]

        def of_image(latents: Float[Array, "h w z"]) -> Int[Array, "h w"]:
            products = jnp.einsum("hwz,nz->hwn", latents, table, precision=lax.Precision.HIGHEST)
            return jnp.argmin(lengths - 2 * products, axis=-1)

        # One image after the other: all distances at once would take more memory than the decoder.
        return lax.map(of_image, z)


class _SpatialNormStage(nnx.Module):
    """Residual blocks, the first of them with attention after each, then perhaps upsampling."""

    def __init__(
        self,
        resnets: Sequence[SpatialNormResnetBlock],
        attentions: Sequence[SpatialNormSelfAttention],
        upsampler: Upsample | None = None,
    ):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions) if attentions else None
        self.upsamplers = nnx.List([upsampler]) if upsampler else None

    def __call__(
        self, x: Float[Array, "b h w c"], latents: Float[Array, "b h2 w2 z"]
    ) -> Float[Array, "b h3 w3 d"]:
        attentions = [] if self.attentions is None else list(self.attentions)
        for resnet, attention in itertools.zip_longest(self.resnets, attentions):
            x = resnet(x, latents)
            if attention is not None:
                x = attention(x, latents)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class SpatialNormDecoder(nnx.Module):
    """Latents to image, by norms that take the latents (MoVQ, 2209.09002)."""

    def __init__(self, config: VQModelConfig, *, layers: LayerFactory):
        channels, z = config.block_out_channels[::-1], config.latent_channels

        def stage(
            n_in: int, n_out: int, count: int, attentions: int, upsampler: Upsample | None = None
        ) -> _SpatialNormStage:
            options: dict[str, Any] = {"layers": layers, "latent_channels": z}
            widths = [n_in, *[n_out] * (count - 1)]
            return _SpatialNormStage(
                [SpatialNormResnetBlock(c, n_out, act=config.act_fn, **options) for c in widths],
                [SpatialNormSelfAttention(n_out, **options) for _ in range(attentions)],
                upsampler,
            )

        self.conv_in = layers.conv(z, channels[0], 3)
        self.mid_block = stage(channels[0], channels[0], 2, int(config.mid_block_add_attention))
        self.up_blocks = nnx.List()
        for i, (n_in, n_out) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            last, count = i == len(channels) - 1, config.layers_per_block + 1
            attentions = count if UP_BLOCKS[config.up_block_types[i]] else 0
            upsampler = None if last else Upsample(n_out, layers=layers)
            self.up_blocks.append(stage(n_in, n_out, count, attentions, upsampler))
        self.conv_norm_out = SpatialNorm(channels[-1], z, layers=layers)
        self.conv_out = layers.conv(channels[-1], config.out_channels, 3)

    def __call__(
        self, x: Float[Array, "b h w z"], latents: Float[Array, "b h w z"]
    ) -> Float[Array, "b h2 w2 c"]:
        """The decoded image of x, with the latents that the norms take."""
        x = self.conv_in(x)
        for stage in (self.mid_block, *self.up_blocks):
            x = stage(x, latents)
        # SiLU, whatever act_fn says, as in the other decoder.
        return self.conv_out(activation("silu")(self.conv_norm_out(x, latents)))


class VQModel(SpatialCodec):
    """The autoencoder: images in [-1, 1] to and from latents of 1/downscale the resolution."""

    def __init__(
        self,
        config: VQModelConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        attention: str = "auto",
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention)
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config.layers, layers=layers, outputs=z)
        self.quant_conv = layers.conv(z, z, 1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, z, layers=layers)
        self.post_quant_conv = layers.conv(z, z, 1)
        self.decoder = (
            SpatialNormDecoder(config, layers=layers)
            if config.has_spatial_norms
            else Decoder(config.layers, layers=layers)
        )

    def encode(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 z"], None]:
        """The unscaled latents before they are quantised, in float32.

        InputError unless height and width are multiples of `config.downscale`.
        """
        check_images(images, self.config.in_channels, self.config.downscale)
        return self.quant_conv(self.encoder(images)).astype(jnp.float32), None

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Images, about [-1, 1] and not clipped, in float32, of unscaled latents.

        They are quantised, but not with spatial norms: Kandinsky's pipelines decode them as they
        are. `quantize` does it where that is wanted.
        """
        check_shape("latents", z, (None, None, None, self.config.latent_channels))
        if isinstance(self.decoder, SpatialNormDecoder):
            images = self.decoder(self.post_quant_conv(z), z)
        else:
            images = self.decoder(self.post_quant_conv(self.quantize(z)))
        return images.astype(jnp.float32)

    def scale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """Unscaled latents to what the diffusion model sees: themselves, with spatial norms."""
        return z if self.config.has_spatial_norms else z * self.config.scaling_factor

    def unscale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """The inverse of `scale`."""
        return z if self.config.has_spatial_norms else z / self.config.scaling_factor
