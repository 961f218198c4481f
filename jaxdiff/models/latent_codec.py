"""What a latent codec is, and pixels: the codec of networks that denoise images themselves."""

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

    def encode(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"] | None]:
        """Mean and log-variance of the unscaled latents; None: there is one latent, the mean."""
        ...

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
        """Images, not clipped, of unscaled latents."""
        ...

    def scale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """Unscaled latents to what the diffusion model sees, about unit variance."""
        ...

    def unscale(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """The inverse of `scale`."""
        ...


class _PixelsConfig(NamedTuple):
    downscale: int = 1
    latent_channels: int = 3


class Pixels(nnx.Module):
    """The codec without weights whose latents are the images in [-1, 1] themselves."""

    config = _PixelsConfig()

    def encode(self, images: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], None]:
        """The images."""
        return images, None

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The images."""
        return z

    scale = unscale = decode


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
