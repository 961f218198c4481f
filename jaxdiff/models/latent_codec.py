"""What a latent codec is; those without a network: pixels, and embeddings of images."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import check_shape
from jaxdiff.models.build import abstract, param_dict, with_params


@runtime_checkable
class LatentCodec(Protocol):
    """Images in [-1, 1] to and from latents, such as those of `AutoencoderKL`."""

    config: Any  # with `downscale`, pixels along the side of one latent, and `latent_channels`

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of the latents of an image of so many pixels."""
        ...

    def encode(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"] | None]:
        """Mean and log-variance of the unscaled latents; None: there is one latent, the mean."""
        ...

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Images, not clipped, of unscaled latents."""
        ...

    def scale(self, z: Float[Array, "b *space z"]) -> Float[Array, "b *space z"]:
        """Unscaled latents to what the diffusion model sees, about unit variance."""
        ...

    def unscale(self, z: Float[Array, "b *space z"]) -> Float[Array, "b *space z"]:
        """The inverse of `scale`."""
        ...


class SpatialCodec(nnx.Module):
    """A codec whose latents are images of their own, (h, w, c)."""

    config: Any

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Height, width and channels of the latents of an image of so many pixels."""
        downscale = self.config.downscale
        return height // downscale, width // downscale, self.config.latent_channels


class _CodecConfig(NamedTuple):
    downscale: int = 1
    latent_channels: int = 3
    force_upcast: bool = False


class Pixels(SpatialCodec):
    """The codec without weights whose latents are the images in [-1, 1] themselves."""

    config = _CodecConfig()

    def encode(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], None]:
        """The images."""
        return images, None

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The images."""
        return z

    scale = unscale = decode


class ImageEmbeddings(nnx.Module):
    """The codec of networks that denoise embeddings of images (d,), whose latents are normalised.

    `mean` and `std` (1, d) are those of the embeddings. There are no images to encode or decode.
    """

    def __init__(self, mean: nnx.Param, std: nnx.Param):
        self.config = _CodecConfig(latent_channels=mean.shape[-1])
        self.mean, self.std = mean, std

    def latent_shape(self, height: int, width: int) -> tuple[int]:
        """The width of an embedding, whatever the size of the image."""
        del height, width
        return (self.config.latent_channels,)

    def encode(self, images: Array) -> tuple[Array, None]:
        """InputError: a network makes embeddings of images."""
        del images
        raise InputError("image: got one for a model that generates embeddings, expected none")

    def decode(self, z: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """The embeddings."""
        return z

    def scale(self, z: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """Embeddings of zero mean and unit variance, in float32."""
        mean, std = (each[...].astype(jnp.float32) for each in (self.mean, self.std))
        return (z.astype(jnp.float32) - mean) / std

    def unscale(self, z: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """The inverse of `scale`."""
        mean, std = (each[...].astype(jnp.float32) for each in (self.mean, self.std))
        return z.astype(jnp.float32) * std + mean


def check_images(images: Float[Array, "b h w c"], channels: int, downscale: int) -> None:
    """InputError unless there are so many channels, and sides that are multiples of `downscale`."""
    check_shape("images", images, (None, None, None, channels))
    for name, length in zip(("height", "width"), images.shape[1:3], strict=True):
        if length % downscale:
            raise InputError(f"image {name}: got {length}, expected a multiple of {downscale}")


def upcast_fp16(codec: Any) -> Any:
    """`codec`, computing in float32 where its config says that float16 overflows in it."""
    stored = param_dict(codec)
    if not any(w.dtype == jnp.float16 for w in stored.values()) or not codec.config.force_upcast:
        return codec
    wide = abstract(type(codec), codec.config, dtype=jnp.float32, param_dtype=jnp.float16)
    return with_params(wide, stored)
