"""What a latent codec is, and pixels: the codec of networks that denoise images themselves."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx

from jaxdiff.core.types import Array, Float


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
