"""A discriminator of patches: which parts of an image look made up (PatchGAN, 1611.07004)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype, Float
from jaxdiff.core.validate import positive
from jaxdiff.nn.initializers import Normal
from jaxdiff.nn.layers import LayerFactory

EPS = 1e-6  # of every norm
SLOPE = 0.2  # of the leaky rectifiers below zero
INITIAL = Normal(0.02)
MAX_WIDTH_FACTOR = 8  # times the first width that the layers grow to
ONE = ((1, 1), (1, 1))  # padding of every convolution, whose kernels are 4 x 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchDiscriminatorConfig:
    """How large it is; with 3 layers a patch is 70 x 70 pixels."""

    width: int = 64  # channels after the first layer, doubled by each that follows, up to 8 times
    layers: int = 3  # that halve the resolution
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        """Refuse sizes that make no network."""
        for name in ("width", "layers", "norm_num_groups"):
            positive(f"discriminator.{name}", getattr(self, name))


class PatchDiscriminator(nnx.Module):
    """Images to one logit for each of their overlapping patches, above 0 where it looks real.

    Each layer is a 4 x 4 convolution, a norm but in the first, and a leaky rectifier: `layers` of
    stride 2 and one of stride 1. One more convolution gives the logits. The norms are over groups
    of channels, not over the batch, so that an image's logits are its own.
    """

    def __init__(
        self,
        config: PatchDiscriminatorConfig,
        channels: int = 3,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs | None,
    ):
        layers = LayerFactory(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        widths = [config.width * min(2**i, MAX_WIDTH_FACTOR) for i in range(config.layers + 1)]
        groups = config.norm_num_groups
        self.config = config
        self.conv_in = layers.conv(channels, widths[0], 4, stride=2, padding=ONE, init=INITIAL)
        self.convs = nnx.List()
        self.norms = nnx.List()
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths), start=1):
            stride = 1 if i == config.layers else 2
            self.convs.append(
                layers.conv(n_in, n_out, 4, stride=stride, padding=ONE, bias=False, init=INITIAL)
            )
            self.norms.append(layers.group_norm(n_out, groups=groups, eps=EPS))
        self.conv_out = layers.conv(widths[-1], 1, 4, padding=ONE, init=INITIAL)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2"]:
        """Logits in float32; InputError for images that are smaller than what makes one."""
        least = 3 * 2**self.config.layers
        if min(images.shape[1:3]) < least:
            raise InputError(
                f"discriminator: got images of {images.shape[1]} x {images.shape[2]}, expected "
                f"sides from {least} on for {self.config.layers} layers"
            )
        x = jax.nn.leaky_relu(self.conv_in(images), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(conv(x)), SLOPE)
        return self.conv_out(x)[..., 0].astype(jnp.float32)
