"""VQModel, the autoencoder of latent diffusion whose latents are vectors of a codebook.

VQGAN (2012.09841) with the quantisation in the decoder, so that a diffusion model sees the
continuous latents before it (2112.10752, section 3.1).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxdiff.core.configs import check_unsupported
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float, Int
from jaxdiff.core.validate import check_shape, positive
from jaxdiff.models.latent_codec import check_images
from jaxdiff.models.vae import AutoencoderKLConfig, Decoder, Encoder
from jaxdiff.nn.layers import LayerFactory


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQModelConfig:
    """The fields of a diffusers VQModel config.json, with its defaults."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "norm_type": ("group",),
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
    scaling_factor: float = 0.18215  # brings latents to unit variance
    norm_type: str = "group"
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


class VQModel(nnx.Module):
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
        self.decoder = Decoder(config.layers, layers=layers)

    def encode(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 z"], None]:
        """The unscaled latents before they are quantised, in float32.

        InputError unless height and width are multiples of `config.downscale`.
        """
        check_images(images, self.config.in_channels, self.config.downscale)
        return self.quant_conv(self.encoder(images)).astype(jnp.float32), None

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Images, about [-1, 1] and not clipped, in float32, of unscaled latents, quantised."""
        check_shape("latents", z, (None, None, None, self.config.latent_channels))
        return self.decoder(self.post_quant_conv(self.quantize(z))).astype(jnp.float32)

    def scale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """Unscaled latents to what the diffusion model sees."""
        return z * self.config.scaling_factor

    def unscale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """The inverse of `scale`."""
        return z / self.config.scaling_factor
