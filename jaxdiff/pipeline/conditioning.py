"""From prompts to the conditioning of the network, as the model's family has it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int, NDArray, PyTree
from jaxdiff.families.base import Family, zero_rows
from jaxdiff.guidance.base import Stream
from jaxdiff.models.text_encoder import TextModel
from jaxdiff.pipeline.closed_vocabulary import warn_out_of_vocabulary
from jaxdiff.pipeline.prompts import (
    MAX_CHUNKS,
    PromptTokenizer,
    SubPrompt,
    Tokens,
    chunk_prompt,
    pad_chunks,
    split_and,
)
from jaxdiff.pipeline.request import Request

# Inputs of the network beside latents and timestep, by the name of its argument, with leaves
# (b, k, ...) for K streams of each image.
Conditioning = Mapping[str, Array | NDArray]
Text = str | None  # None: not given


class TokenizedPrompts(NamedTuple):
    """Texts of K streams as the compiled encoders read them: one entry per encoder in the tuples.

    Streams with `zero_out` become zeros, whatever their ids.
    """

    ids: tuple[Int[NDArray, "b k m n"], ...]
    weights: tuple[Float[NDArray, "b k m n"], ...]
    zero_out: Bool[NDArray, "b k"]


class EncodedPrompts(NamedTuple):
    """The texts' part of a batch's conditioning, on the host."""

    conditioning: Mapping[str, NDArray]


class PromptTokenizers(NamedTuple):
    """The tokenizers of a model, by text encoder."""

    family: Family
    by_encoder: Mapping[str, PromptTokenizer]
    closed: bool = False  # whether words that are several tokens were never trained on

    @property
    def first(self) -> PromptTokenizer:
        """That of the first text encoder; InputError if there is none."""
        for tokenizer in self.by_encoder.values():
            return tokenizer
        raise InputError(f"tokenizer: got none, as {self.family.name} has no text encoder")

    def num_chunks(self, requests: Sequence[Request], streams: Sequence[Stream]) -> list[int]:
        """How many chunks the longest text of each image has.

        Warns of truncated prompts, and of words that the model was not trained on.
        """
        by_encoder = [self._chunks(each, streams) for each in requests]
        for request, rows in zip(requests, by_encoder, strict=True):
            missing = {
                name: count
                for name, row in zip(self.by_encoder, rows, strict=True)
                if (count := max((tokens.num_truncated for tokens in row), default=0))
            }
            if missing:
                # Where some text encoder reads all of it, which ones do not.
                where = f" in {', '.join(missing)}" if len(missing) < len(rows) else ""
                message = (
                    f"prompt: truncated, {max(missing.values())} tokens are missing from the end "
                    f"of {request.prompt!r:.60}{where}"
                )
                warnings.warn(message, stacklevel=2)
        chunked = [[tokens for row in rows for tokens in row] for rows in by_encoder]
        if self.closed:
            texts = [text for each in requests for text in texts_by_encoder(each, streams)[0]]
            warn_out_of_vocabulary(self.first, texts, syntax=requests[0].prompt_syntax)
        return [max((len(tokens.ids) for tokens in texts), default=0) for texts in chunked]

    def tokenize(self, requests: Sequence[Request], streams: Sequence[Stream]) -> TokenizedPrompts:
        """The tokens of all streams of images that have equally many chunks."""
        lengths = self._lengths(requests[0])  # of all, as they share a batch
        pairs = zip(self.by_encoder.values(), lengths, strict=True)
        empty = [chunk_prompt(tokenizer, "", length=length) for tokenizer, length in pairs]
        ids, weights = [], []
        for request in requests:
            rows = self._chunks(request, streams)
            longest = max((len(tokens.ids) for row in rows for tokens in row), default=0)
            limits = [spec.max_chunks or longest for spec in self.family.text_encoders]
            padded = [
                [pad_chunks(tokens, min(longest, limit), blank) for tokens in row]
                for row, blank, limit in zip(rows, empty, limits, strict=True)
            ]
            ids.append([np.stack([tokens.ids for tokens in row]) for row in padded])
            weights.append([np.stack([tokens.weights for tokens in row]) for row in padded])
        missing = [[t is None for t in texts_by_encoder(each, streams)[0]] for each in requests]
        return TokenizedPrompts(
            ids=tuple(map(np.stack, zip(*ids, strict=True))),
            weights=tuple(map(np.stack, zip(*weights, strict=True))),
            zero_out=np.array(missing) & self.family.zero_uncond,
        )

    def _chunks(self, request: Request, streams: Sequence[Stream]) -> list[list[Tokens]]:
        """The tokens of each text encoder's texts, of which each stream has one."""
        syntax, texts = request.prompt_syntax, texts_by_encoder(request, streams)
        limits = [spec.max_chunks or MAX_CHUNKS for spec in self.family.text_encoders]
        numbers, lengths = self.family.prompt_numbers, self._lengths(request)
        return [
            [
                chunk_prompt(
                    tokenizer,
                    text or "",
                    syntax=syntax,
                    max_chunks=limits[i],
                    length=lengths[i],
                )
                for text in texts[numbers[i] - 1]
            ]
            for i, tokenizer in enumerate(self.by_encoder.values())
        ]

    def _lengths(self, request: Request) -> list[int | None]:
        """How many tokens each text encoder reads at once; None: as its tokenizer says."""
        asked = request.max_sequence_length
        return [asked if spec.max_length else None for spec in self.family.text_encoders]


def sub_prompts(request: Request) -> list[SubPrompt]:
    """The prompts of an image, several where AND joins them."""
    return split_and(request.prompt, syntax=request.prompt_syntax)


def texts_by_encoder(request: Request, streams: Sequence[Stream]) -> list[list[Text]]:
    """What readers of each prompt of an image, the first to the third, read in its streams."""
    by_encoder = []
    for negative, own in request.prompts_for_encoder():
        parts = split_and(own, syntax=request.prompt_syntax)
        by_encoder.append([_text(stream, negative, parts) for stream in streams])
    return by_encoder


def _text(stream: Stream, negative: Text, parts: Sequence[SubPrompt]) -> Text:
    if stream.prompt_source == "negative":
        return negative
    # Images with fewer prompts than others have null streams of weight 0.
    if stream.prompt_source == "null" or stream.prompt_index >= len(parts):
        return None
    return parts[stream.prompt_index].text


def apply_token_weights(
    states: Float[Array, "t n d"], weights: Float[Array, "t n"]
) -> Float[Array, "t n d"]:
    """States of tokens times their weights, brought back to the mean that they had.

    As the AUTOMATIC1111 web UI does it; where every weight is 1 nothing changes.
    """
    wide = states.astype(jnp.float32)
    heavy = wide * weights[..., None]
    before, after = (x.mean(axis=(1, 2), keepdims=True) for x in (wide, heavy))
    restored = jnp.where(after == 0, 1.0, before / jnp.where(after == 0, 1.0, after))
    plain = jnp.all(weights == 1, axis=1)[:, None, None]
    return jnp.where(plain, states, (heavy * restored).astype(states.dtype))


def encode_prompts(
    params: tuple[PyTree, ...],
    prompts: TokenizedPrompts,
    *,
    encoders: tuple[Callable[[PyTree], TextModel], ...],
    family: Family,
    skip: int,
) -> Conditioning:
    """The texts' part of the conditioning; the chunks of a text stand one after the other."""
    inputs = zip(family.text_encoders, encoders, params, prompts.ids, prompts.weights, strict=True)
    outputs = []
    for spec, encoder, table, ids, weights in inputs:
        b, k, m = ids.shape[:3]
        output = spec.encode(encoder(table), jnp.reshape(ids, (b * k * m, -1)), skip)
        if (states := output.hidden_states) is not None:
            states = apply_token_weights(states, jnp.reshape(weights, (b * k * m, -1)))
            output = output._replace(hidden_states=states.reshape(b, k, -1, states.shape[-1]))
        if output.pooled is not None:  # that of a text in several chunks is of the first
            output = output._replace(pooled=output.pooled.reshape(b, k, m, -1)[:, :, 0])
        if output.mask is not None:
            output = output._replace(mask=output.mask.reshape(b, k, -1))
        outputs.append(zero_rows(jnp.asarray(prompts.zero_out), output))
    return family.text_conditioning(outputs)
