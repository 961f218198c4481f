"""From prompts to the conditioning of the network, as the model's family has it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int, NDArray, PyTree
from jaxdiff.families.base import Family, zero_rows
from jaxdiff.pipeline.prompts import chunk_prompt, pad_chunks
from jaxdiff.pipeline.request import Request
from jaxdiff.pipeline.vocabulary import TextualInversionTokenizer

# Inputs of the network beside latents and timestep, by the name of its argument, with leaves
# (b, k, ...) for K streams of each image.
Conditioning = dict[str, Array]


class TokenizedPrompts(NamedTuple):
    """Texts of K streams as the compiled encoders read them: one entry per encoder in the tuples.

    Streams with `zero_out` become zeros, whatever their ids. The ids of one image have no
    leading b.
    """

    ids: tuple[Int[NDArray, "b k m n"], ...]
    weights: tuple[Float[NDArray, "b k m n"], ...]
    zero_out: Bool[NDArray, "b k"]


def check_request(family: Family, request: Request) -> None:
    """InputError for options that neither the text encoders nor the network take."""
    for name in ("prompt_2", "negative_prompt_2"):
        got = getattr(request, name)
        if got and len(family.text_encoders) == 1:
            raise InputError(
                f"{name}: got {got!r:.60}, expected none for a model with one text encoder"
            )
    second = request.negative_prompt_2
    if second and request.negative_prompt is None and family.zero_uncond:
        raise InputError(
            f"negative_prompt_2: got {second!r:.60} without a negative_prompt, "
            'expected a negative_prompt too (it may be "")'
        )
    for extra in family.extras:
        extra.check({"guidance": request.guidance, **request.extras})


def tokenize_prompts(
    family: Family,
    vocabularies: Sequence[TextualInversionTokenizer],
    texts: Sequence[Sequence[str | None]],
    *,
    syntax: bool,
) -> tuple[TokenizedPrompts, int]:
    """One image's words, all streams in as many chunks; and how many tokens found no room.

    `texts` are those of its K streams, None where none was given, for each encoder.
    """
    rows = [
        [chunk_prompt(vocabulary, text or "", syntax=syntax) for text in streams]
        for vocabulary, streams in zip(vocabularies, texts, strict=True)
    ]
    longest = max(len(tokens.ids) for row in rows for tokens in row)
    even = [
        [pad_chunks(tokens, longest, chunk_prompt(vocabulary, "")) for tokens in row]
        for vocabulary, row in zip(vocabularies, rows, strict=True)
    ]
    words = TokenizedPrompts(
        ids=tuple(np.stack([tokens.ids for tokens in row]) for row in even),
        weights=tuple(np.stack([tokens.weights for tokens in row]) for row in even),
        zero_out=np.array([family.zero_uncond and text is None for text in texts[0]]),
    )
    return words, max(tokens.num_truncated for row in rows for tokens in row)


def apply_token_weights(
    states: Float[Array, "t n d"], weights: Float[Array, "t n"]
) -> Float[Array, "t n d"]:
    """States of tokens times their weights, brought back to the mean that they had.

    As the AUTOMATIC1111 web UI does it; where every weight is 1 nothing changes.
    """
    wide = states.astype(jnp.float32)
    heavy = wide * weights[..., None]
    before, after = (x.mean(axis=(1, 2), keepdims=True) for x in (wide, heavy))
    kept = jnp.where(after == 0, 1.0, before / jnp.where(after == 0, 1.0, after))
    plain = jnp.all(weights == 1, axis=1)[:, None, None]
    return jnp.where(plain, states, (heavy * kept).astype(states.dtype))


def encode_prompts(
    params: tuple[PyTree, ...],
    prompts: TokenizedPrompts,
    *,
    graphs: tuple[Any, ...],
    family: Family,
    skip: int,
) -> Conditioning:
    """The texts' part of the conditioning; the chunks of a text stand one after the other."""
    b, k, m = prompts.ids[0].shape[:3]
    inputs = zip(family.text_encoders, graphs, params, prompts.ids, prompts.weights, strict=True)
    outputs = []
    for encoder, graph, table, ids, weights in inputs:
        features = nnx.merge(graph, table).features(ids.reshape(b * k * m, -1), skip)
        output = encoder.select(features)
        states = apply_token_weights(output.hidden_states, jnp.reshape(weights, (b * k * m, -1)))
        output = output._replace(hidden_states=states.reshape(b, k, -1, states.shape[-1]))
        if output.pooled is not None:  # that of a text in several chunks is of the first
            output = output._replace(pooled=output.pooled.reshape(b, k, m, -1)[:, :, 0])
        outputs.append(zero_rows(jnp.asarray(prompts.zero_out), output))
    return family.join(outputs)
