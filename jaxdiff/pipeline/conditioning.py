"""From prompts to the conditioning of the network; see `models.conditioning` for each family."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int, NDArray, PyTree
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.conditioning import hidden_states as states_of
from jaxdiff.models.conditioning import num_time_ids
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.pipeline.prompts import chunk_prompt, pad_chunks
from jaxdiff.pipeline.request import SDXL_SIZE_FIELDS, Request
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConditioner:
    """How a family makes its conditioning of the encoders' features."""

    num_time_ids: int | None  # None: no pooled embedding either
    zero_uncond: bool = False  # a negative prompt that was not given is zeros, not the empty text
    encoders: int = 1

    @classmethod
    def of(
        cls, unet: UNet2DConditionConfig, encoders: Sequence[CLIPTextModel], zero_uncond: bool
    ) -> "TextConditioner":
        """The conditioner of the network's config; InputError if the encoders do not fit it."""
        added = num_time_ids(unet, encoders)
        if added is None:
            return cls(num_time_ids=None)
        return cls(num_time_ids=added, zero_uncond=zero_uncond, encoders=len(encoders))

    def check(self, request: Request) -> None:
        """InputError for options that neither the encoders nor the network take."""
        for name in ("prompt_2", "negative_prompt_2"):
            got = next(filter(None, getattr(request, name.replace("prompt", "prompts"))), None)
            if got is not None and self.encoders == 1:
                raise InputError(
                    f"{name}: got {got!r:.60}, expected none for a model with one text encoder"
                )
        pairs = zip(request.negative_prompts, request.negative_prompts_2, strict=True)
        for first, second in pairs if self.zero_uncond else ():
            if second and first is None:
                raise InputError(
                    f"negative_prompt_2: got {second!r:.60} without a negative_prompt, "
                    'expected a negative_prompt too (it may be "")'
                )
        for name in SDXL_SIZE_FIELDS if self.num_time_ids is None else ():
            if getattr(request, name) not in (None, (0, 0)):
                got = getattr(request, name)
                raise InputError(
                    f"{name}: got {got}, expected none for a model that does not take sizes"
                )

    def time_ids(
        self, request: Request, prompted: Sequence[bool]
    ) -> Float[NDArray, "b k i"] | None:
        """Sizes and crops (height before width), or an aesthetic score, for each stream.

        `prompted` marks the streams that get the image's own values; the others get the null
        stream's. A null stream with a size or score of its own gets no crop unless the request has
        one.
        """
        if self.num_time_ids is None:
            return None
        size = (request.height, request.width)
        original, target = request.original_size or size, request.target_size or size
        scored, crop = self.num_time_ids == 5, request.crop_top_left
        apart = scored or request.negative_original_size or request.negative_target_size
        null = (
            request.negative_original_size or original,
            request.negative_crop_top_left or ((0, 0) if apart else crop),
            (request.negative_aesthetic_score,)
            if scored
            else request.negative_target_size or target,
        )
        own = (original, crop, (request.aesthetic_score,) if scored else target)
        rows = [np.concatenate(own if mine else null) for mine in prompted]
        return np.tile(np.array(rows, np.float32), (len(request.prompts), 1, 1))

    def tokenize(
        self,
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
            zero_out=np.array([self.zero_uncond and text is None for text in texts[0]]),
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
    pooled: bool,
    skip: int,
) -> Conditioning:
    """Text states of all encoders side by side, chunks one after the other; `pooled` as in XL."""
    shape = prompts.ids[0].shape[:3]
    features = [
        nnx.merge(graph, weights).features(ids.reshape(-1, ids.shape[-1]), skip)
        for graph, weights, ids in zip(graphs, params, prompts.ids, strict=True)
    ]
    states = [
        apply_token_weights(states_of(f, pooled=pooled), jnp.reshape(w, (-1, w.shape[-1])))
        for f, w in zip(features, prompts.weights, strict=True)
    ]
    context = jnp.concatenate([s.reshape(*shape[:2], -1, s.shape[-1]) for s in states], axis=-1)
    # The end of a text in several chunks is that of the first.
    ends = features[-1].pooled.reshape(*shape, -1)[:, :, 0]
    nonzero = ~prompts.zero_out[..., None]
    cond = {"context": jnp.where(nonzero[..., None], context, 0)}
    return cond | ({"text_embeds": jnp.where(nonzero, ends, 0)} if pooled else {})
