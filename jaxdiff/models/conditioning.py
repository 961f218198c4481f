"""The conditioning of a UNet beside latents and timestep, from the features of text encoders.

Stable Diffusion 1 and 2 take the normed last hidden states of one encoder. Stable Diffusion XL
takes the concatenated penultimate hidden states of all its encoders, which may read different
texts, the pooled embedding of the last encoder and six time ids (2307.01952, section 2.2); its
refiner takes five, with an aesthetic score instead of the target size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int
from jaxdiff.models.clip import CLIPTextModel, TextFeatures
from jaxdiff.models.unet.config import UNet2DConditionConfig

ENCODERS = ("text_encoder", "text_encoder_2")  # in the order of their states
# The names of cached text embeddings in data sets: the hidden states of each encoder, and the
# pooled embedding.
EMBEDDING_COLUMNS: dict[str, str] = dict(zip(ENCODERS, ("states", "states_2"), strict=True))
POOLED = "pooled"


class TextEncoderOutput(NamedTuple):
    """What one text encoder gives the UNet."""

    hidden_states: Float[Array, "b n d"]
    pooled: Float[Array, "b p"] | None = None  # pooled embedding, if the UNet takes it


def num_time_ids(unet: UNet2DConditionConfig, encoders: Sequence[CLIPTextModel]) -> int | None:
    """The number of time ids beside the pooled embedding; None if the UNet takes neither.

    InputError if the encoders do not fit the UNet.
    """
    width = sum(encoder.config.hidden_size for encoder in encoders)
    wanted = unet.per_block("cross_attention_dim")[0]
    if width != wanted:
        raise InputError(
            f"text encoders: got hidden states of width {width}, expected {wanted}, as the UNet has"
        )
    if unet.addition_embed_type is None:
        if len(encoders) != 1:
            raise InputError(f"text encoders: got {len(encoders)}, expected 1")
        return None
    pooled = encoders[-1].config.projection_dim
    if encoders[-1].text_projection is None or pooled is None:
        raise InputError(
            "text encoders: got a last one without text_projection, expected one with it"
        )
    numbers = (unet.projection_class_embeddings_input_dim or 0) - pooled
    added, rest = divmod(numbers, unet.addition_time_embed_dim or 1)
    if rest or added not in (5, 6):
        raise InputError(
            f"UNet: got {numbers} inputs besides {pooled} of the pooled embedding, expected "
            f"5 or 6 times {unet.addition_time_embed_dim}"
        )
    return added


def hidden_states(features: TextFeatures, *, pooled: bool) -> Float[Array, "b n d"]:
    """One encoder's hidden states for the UNet; `pooled` if it takes a pooled embedding too."""
    return features.penultimate if pooled else features.last


def encode_text(
    encoder: CLIPTextModel, ids: Int[Array, "b n"], *, pooled: bool
) -> TextEncoderOutput:
    """Encode the token ids of texts."""
    features = encoder.features(ids)
    return TextEncoderOutput(
        hidden_states(features, pooled=pooled), features.pooled if pooled else None
    )


def make_conditioning(
    text_outputs: Sequence[TextEncoderOutput],
    time_ids: Float[Array, "b i"] | None = None,
    *,
    zeroed: Sequence[Bool[Array, "b"]] | None = None,
) -> dict[str, Array]:
    """The outputs of all encoders as arguments of the UNet; `time_ids` go with a pooled embedding.

    The outputs of the texts that are `zeroed` for an encoder are zeros.
    """
    if zeroed is not None:
        pairs = zip(zeroed, text_outputs, strict=True)
        text_outputs = [select(s, jax.tree.map(jnp.zeros_like, each), each) for s, each in pairs]
    cond = {"context": jnp.concatenate([each.hidden_states for each in text_outputs], axis=-1)}
    pooled = text_outputs[-1].pooled
    if time_ids is None or pooled is None:
        return cond
    return cond | {"text_embeds": pooled, "time_ids": time_ids}


def select(
    condition: Bool[Array, "b"], first: TextEncoderOutput, second: TextEncoderOutput
) -> TextEncoderOutput:
    """For each text `first` where `condition` is true, else `second`."""
    hidden_states = jnp.where(condition[:, None, None], first.hidden_states, second.hidden_states)
    if first.pooled is None or second.pooled is None:
        return TextEncoderOutput(hidden_states)
    return TextEncoderOutput(
        hidden_states, jnp.where(condition[:, None], first.pooled, second.pooled)
    )


def unused_parameters(encoder: CLIPTextModel, *, pooled: bool, last: bool) -> tuple[str, ...]:
    """Path prefixes of an encoder's weights that the conditioning does not depend on.

    `last` is whether it is the last encoder, which gives the pooled embedding if there is one.
    """
    if pooled and last:
        return ()
    if not pooled:
        return ("text_projection.",)
    end = encoder.config.num_hidden_layers - 1
    names = (f"encoder.layers.{end}.", "final_layer_norm.")
    return ("text_projection.", *(f"text_model.{name}" for name in names))
