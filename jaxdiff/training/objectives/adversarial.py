"""The GAN loss of a VAE: its decoder is the generator.

Each network's loss stops the gradient to the other network's parameters, so that the gradient of
their sum is each network's own gradient: one step, one optimiser and one dict of parameters serve
both (VQGAN, 2012.09841, eq. 5 to 7; latent diffusion, 2112.10752, appendix G).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.nn.layers import Conv
from jaxdiff.training.step import Params

ImageLoss = Callable[[Float[Array, "b h w c"]], Float[Array, ""]]


class GANLoss(NamedTuple):
    """The losses of both networks, and lambda of the generator's."""

    generator: Float[Array, ""]  # no gradient for the discriminator's parameters
    discriminator: Float[Array, ""]  # gradient for these only
    adaptive_weight: Float[Array, ""]  # no gradient


def gan_loss(
    discriminator: PatchDiscriminator,
    params: Params,
    layer: Conv,
    features: Float[Array, "b h w d"],
    images: Float[Array, "b h w c"],
    reconstruction: ImageLoss | None,
) -> GANLoss:
    """The losses where `layer` turns `features` into images that should look like `images`.

    `params` are the weights of the (abstract) discriminator. The adaptive weight is that relative
    to the `reconstruction` loss; for None it is 1.
    """
    trained, frozen = (
        with_params(discriminator, w) for w in (params, jax.lax.stop_gradient(params))
    )
    fake = last_layer_image(layer, features)

    def generator_loss(fakes: Float[Array, "b h w c"]) -> Float[Array, ""]:
        return -jnp.mean(frozen(fakes))

    return GANLoss(
        generator=generator_loss(fake),
        discriminator=hinge_loss(trained(images), trained(jax.lax.stop_gradient(fake))),
        adaptive_weight=jnp.float32(1)
        if reconstruction is None
        else adaptive_weight(layer, features, reconstruction, generator_loss),
    )


def last_layer_image(layer: Conv, features: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
    """The output of the decoder's last layer, in float32."""
    return layer(features).astype(jnp.float32)


def hinge_loss(real: Float[Array, "*b"], fake: Float[Array, "*b"]) -> Float[Array, ""]:
    """The discriminator's loss: penalises logits of real images below 1 and of fakes above -1.

    The mean of both (1705.02894, eq. 2, halved as in latent diffusion).
    """
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def adaptive_weight(
    layer: Conv,
    features: Float[Array, "b h w d"],
    reconstruction: ImageLoss,
    adversarial: ImageLoss,
) -> Float[Array, ""]:
    """lambda = |grad reconstruction| / (|grad adversarial| + 1e-6) (2012.09841, eq. 7).

    The gradients are those of the kernel of `layer`, the decoder's last. It is at most 1e4 and has
    no gradient itself.
    """
    table, features = jax.lax.stop_gradient((param_dict(layer), features))
    image, vjp = jax.vjp(lambda table: last_layer_image(with_params(layer, table), features), table)

    def norm(loss: ImageLoss) -> Float[Array, ""]:
        (grads,) = vjp(jax.grad(loss)(image))
        return jnp.sqrt(jnp.sum(jnp.square(grads["kernel"])))

    return jnp.minimum(norm(reconstruction) / (norm(adversarial) + 1e-6), 1e4)
