"""What a UNet is told beside latents and time, made of the features of text encoders.

Stable Diffusion 1 and 2 are told the normed last states of one encoder. Stable Diffusion XL is told
the states before the last layer of all its encoders side by side, which may read different texts,
and beside them the projected end of the text of the last encoder and six numbers (2307.01952,
section 2.2); its refiner five, with an aesthetic score in the place of the target size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int
from jaxdiff.models.clip import CLIPTextModel, TextFeatures
from jaxdiff.models.unet_config import UNet2DConditionConfig

ENCODERS = ("text_encoder", "text_encoder_2")  # in the order of their states
# What data that have no captions but what encoders say of them call the states of each, and the
# projected end of the text.
STATES: dict[str, str] = dict(zip(ENCODERS, ("states", "states_2"), strict=True))
POOLED = "pooled"
SIZES = 6  # numbers that a UNet is told of a picture's size


class Conditions(NamedTuple):
    """One stream's conditions: what the UNet's call takes by these names."""

    context: Float[Array, "b n d"]
    text_embeds: Float[Array, "b p"] | None = None
    time_ids: Float[Array, "b i"] | None = None


class Said(NamedTuple):
    """What one text encoder says of texts."""

    states: Float[Array, "b n d"]
    end: Float[Array, "b p"] | None = None  # projected end of the text, where it is told


def numbers_told(unet: UNet2DConditionConfig, encoders: Sequence[CLIPTextModel]) -> int | None:
    """How many numbers the UNet is told beside pooled text; None where it is told neither.

    InputError if the encoders do not fit the UNet.
    """
    width = sum(encoder.config.hidden_size for encoder in encoders)
    wanted = unet.per_block("cross_attention_dim")[0]
    if width != wanted:
        raise InputError(
            f"text encoders: got states of width {width}, expected the UNet's {wanted}"
        )
    if unet.addition_embed_type is None:
        if len(encoders) != 1:
            raise InputError(f"text encoders: got {len(encoders)}, expected 1")
        return None
    pooled = encoders[-1].config.projection_dim
    if encoders[-1].text_projection is None or pooled is None:
        raise InputError("text encoders: got no projection in the last, expected one")
    numbers = (unet.projection_class_embeddings_input_dim or 0) - pooled
    added, rest = divmod(numbers, unet.addition_time_embed_dim or 1)
    if rest or added not in (5, 6):
        raise InputError(
            f"UNet: got {numbers} inputs beside {pooled} of pooled text, expected "
            f"5 or 6 times {unet.addition_time_embed_dim}"
        )
    return added


def states(features: TextFeatures, *, pooled: bool) -> Float[Array, "b n d"]:
    """One encoder's states that are told, `pooled` where its end of the text is told too."""
    return features.penultimate if pooled else features.last


def said(encoder: CLIPTextModel, ids: Int[Array, "b n"], *, pooled: bool) -> Said:
    """What an encoder says of the texts that are `ids` for it."""
    features = encoder.features(ids)
    return Said(states(features, pooled=pooled), features.pooled if pooled else None)


def conditions(
    heard: Sequence[Said],
    time_ids: Float[Array, "b i"] | None = None,
    *,
    silent: Sequence[Bool[Array, "b"]] | None = None,
) -> Conditions:
    """What is told of what each encoder says; `time_ids` where pooled text is told too.

    What an encoder says of the texts that are `silent` for it is zeros.
    """
    if silent is not None:
        pairs = zip(silent, heard, strict=True)
        heard = [chosen(s, jax.tree.map(jnp.zeros_like, each), each) for s, each in pairs]
    context = jnp.concatenate([each.states for each in heard], axis=-1)
    return Conditions(context, None if time_ids is None else heard[-1].end, time_ids)


def chosen(which: Bool[Array, "b"], first: Said, second: Said) -> Said:
    """For each text `first` where `which` is true, else `second`."""
    states = jnp.where(which[:, None, None], first.states, second.states)
    if first.end is None or second.end is None:
        return Said(states)
    return Said(states, jnp.where(which[:, None], first.end, second.end))


def unheard(encoder: CLIPTextModel, *, pooled: bool, last: bool) -> tuple[str, ...]:
    """How the paths begin of an encoder's weights that no condition depends on.

    `last` is whether it is the last encoder, whose end of the text is told where that is `pooled`.
    """
    if pooled and last:
        return ()
    if not pooled:
        return ("text_projection.",)
    end = encoder.config.num_hidden_layers - 1
    names = (f"encoder.layers.{end}.", "final_layer_norm.")
    return ("text_projection.", *(f"text_model.{name}" for name in names))
