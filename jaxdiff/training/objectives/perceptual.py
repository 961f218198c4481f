"""The perceptual loss: the distance of images in the hidden states of CLIP."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.models.build import with_params
from jaxdiff.models.clip import CLIPVisionModel
from jaxdiff.models.image_processor import CLIPImageProcessor


class PerceptualModel(NamedTuple):
    """A CLIP vision tower and its image processor."""

    module: CLIPVisionModel  # abstract: weights are an argument
    image_processor: CLIPImageProcessor

    def loss(
        self,
        params: Mapping[str, Any],
        images: Float[Array, "b h w c"],
        others: Float[Array, "b h w c"],
    ) -> Float[Array, ""]:
        """`hidden_state_distance` of images in [-1, 1], of the inputs of all layers of the tower.

        The state after the last layer is left out: CLIP trains only its class token.
        """
        tower = with_params(self.module, params).vision_model
        states, other_states = (
            tower.states(self.image_processor(x))[:-1] for x in (images, others)
        )
        return hidden_state_distance(states, other_states)


def hidden_state_distance(
    states: Sequence[Float[Array, "b n d"]], others: Sequence[Float[Array, "b n d"]]
) -> Float[Array, ""]:
    """The squared distance of hidden states as unit vectors, averaged over patches and layers.

    That is LPIPS (1801.03924, eq. 1) without learned weights; it is from 0 to 4. The first state of
    each layer, the class token, is not a patch and does not count.
    """

    def unit(x: Float[Array, "b n d"]) -> Float[Array, "b p d"]:
        x = x[:, 1:].astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-10)

    pairs = zip(states, others, strict=True)
    each = [jnp.mean(jnp.sum(jnp.square(unit(a) - unit(b)), axis=-1)) for a, b in pairs]
    return jnp.mean(jnp.stack(each))
