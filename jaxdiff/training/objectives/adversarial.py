"""Two players in one loss: a decoder that makes pictures, and a discriminator that tells them.

Each player's term holds the other one's part still, so that the gradient of their sum by the
weights of one is the gradient of its own loss: one step, one optimiser and one table of weights do
for both (VQGAN, 2012.09841, eq. 5 to 7; latent diffusion, 2112.10752, appendix G).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.nn.layers import Conv
from jaxdiff.training.objectives import Params

LossOfPictures = Callable[[Float[Array, "b h w c"]], Float[Array, ""]]


class Contest(NamedTuple):
    """What the players lose, and how much the decoder's part weighs before its fixed factor."""

    decoder: Float[Array, ""]  # no gradient by the discriminator's weights
    discriminator: Float[Array, ""]  # gradient by these only
    balance: Float[Array, ""]  # no gradient


def contest(
    critic: PatchDiscriminator,
    learning: Params,
    layer: Conv,
    features: Float[Array, "b h w d"],
    images: Float[Array, "b h w c"],
    reconstruction: LossOfPictures | None,
) -> Contest:
    """The players' losses where `layer` makes pictures of `features`, to be taken for `images`.

    `learning` are the weights of the (abstract) critic. The balance is that with `reconstruction`,
    None: 1.
    """
    judge, still = (with_params(critic, w) for w in (learning, jax.lax.stop_gradient(learning)))
    made = picture(layer, features)

    def fooling(pictures: Float[Array, "b h w c"]) -> Float[Array, ""]:
        return -jnp.mean(still(pictures))

    return Contest(
        decoder=fooling(made),
        discriminator=hinge(judge(images), judge(jax.lax.stop_gradient(made))),
        balance=jnp.float32(1)
        if reconstruction is None
        else balance(layer, features, reconstruction, fooling),
    )


def picture(layer: Conv, features: Float[Array, "b h w d"]) -> Float[Array, "b h w c"]:
    """What the decoder's last layer makes, in float32."""
    return layer(features).astype(jnp.float32)


def hinge(real: Float[Array, "*b"], made: Float[Array, "*b"]) -> Float[Array, ""]:
    """The discriminator's loss: logits of real pictures below 1 and of others above -1 cost.

    The mean of both (1705.02894, eq. 2, halved as in latent diffusion).
    """
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + made)))


def balance(
    layer: Conv,
    features: Float[Array, "b h w d"],
    reconstruction: LossOfPictures,
    adversarial: LossOfPictures,
) -> Float[Array, ""]:
    """lambda = |grad reconstruction| / (|grad adversarial| + 1e-6), by the kernel of `layer`.

    2012.09841, eq. 7, where `layer` is the decoder's last. It is at most 1e4, and a number: no
    gradient goes through it.
    """
    table, features = jax.lax.stop_gradient((param_dict(layer), features))
    made, pull = jax.vjp(lambda table: picture(with_params(layer, table), features), table)

    def norm(loss: LossOfPictures) -> Float[Array, ""]:
        (grads,) = pull(jax.grad(loss)(made))
        return jnp.sqrt(jnp.sum(jnp.square(grads["kernel"])))

    return jnp.minimum(norm(reconstruction) / (norm(adversarial) + 1e-6), 1e4)
