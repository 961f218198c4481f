"""Textual inversions in a pipeline: new tokens, and their embeddings in the text encoders."""

import pathlib
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.checkpoints.textual_inversion import (
    Inversion,
    optional_encoders,
    read_bundled,
    read_inversion,
)
from jaxdiff.checkpoints.tokenizers import TokenizerFiles
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, NDArray
from jaxdiff.models.clip import extend_token_embedding
from jaxdiff.models.text_encoder import TextModel
from jaxdiff.parallel.sharding import fit_sharding
from jaxdiff.pipeline.prompts import PromptTokenizer
from jaxdiff.pipeline.tokenizers import tokenizer_of


class TextualInversionManager:
    """The textual inversions of some text encoders, by component.

    The tokenizers in `tokenizers` change as tokens are added and removed.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, PromptTokenizer],
        encoders: Mapping[str, TextModel],
        files: Mapping[str, TokenizerFiles],
    ) -> None:
        self._tokenizers, self._encoders, self._files = tokenizers, encoders, files
        self._optional = optional_encoders(encoders)
        self._original: dict[str, Array] = {}  # the token embeddings before any was added
        self._loaded: dict[str, tuple[Inversion, bool]] = {}  # by token; whether it is a LoRA's

    @property
    def tokens(self) -> tuple[str, ...]:
        """The added tokens."""
        return tuple(self._loaded)

    def load(self, source: pathlib.Path, token: str | None) -> str:
        """Add the token of a file to the tokenizers of encoders that it is for; returns it.

        `token` replaces the file's own. Raises InputError, with nothing changed, for vectors that
        do not fit and for a token that exists.
        """
        inversion = read_inversion(source, self._widths(), token, optional=self._optional)
        self._check([inversion])
        self.add([inversion])
        return inversion.token

    def read_bundled(self, source: pathlib.Path) -> list[Inversion]:
        """The tokens in a LoRA file, checked as `load` does, and not added."""
        found = read_bundled(source, self._widths(), optional=self._optional)
        self._check(found)
        return found

    def _widths(self) -> dict[str, int]:
        return {name: encoder.config.hidden_size for name, encoder in self._encoders.items()}

    def _check(self, inversions: Sequence[Inversion]) -> None:
        """InputError for a token that cannot be one or exists."""
        for word in (inversion.token for inversion in inversions):
            if not word or any(c.isspace() or c in "()[]\\" for c in word):
                raise InputError(
                    f"token: got {word!r}, expected a token without spaces and brackets"
                )
            if any(word in each.tokenizer.get_vocab() for each in self._tokenizers.values()):
                raise InputError(
                    f"token: got {word!r}, which the tokenizer already has, expected a new token"
                )

    def add(self, inversions: Sequence[Inversion], *, bundled: bool = False) -> None:
        """Add checked tokens; `bundled` says that they came with a LoRA."""
        for inversion in inversions:
            for name, vectors in inversion.vectors.items():
                self._add(name, inversion.token, vectors)
            self._loaded[inversion.token] = inversion, bundled

    def _add(self, component: str, word: str, vectors: Float[NDArray, "n d"]) -> None:
        """Add `word`, which stands for as many ids as there are vectors."""
        own, tokenizer = self._tokenizers[component], self._tokenizers[component].tokenizer
        first = len(tokenizer)
        tokenizer.add_tokens([word, *(f"{word}_{i}" for i in range(1, len(vectors)))])
        if tokenizer.convert_tokens_to_ids(word) != first:
            raise InputError(
                f"token: got {word!r}, expected a text that is one token after it is added"
            )
        own.expansions[first] = list(range(first, first + len(vectors)))
        embedding = self._embedding(component)
        table = embedding[...]
        self._original.setdefault(component, table)
        longer = extend_token_embedding(table, first, jnp.asarray(vectors))
        embedding.set_value(jax.device_put(longer, fit_sharding(table.sharding, longer.shape)))

    def remove(self, *, only_bundled: bool = False) -> None:
        """Remove all added tokens, or those of LoRAs; the embeddings are as before, bit for bit."""
        remaining = [
            each for each, bundled in self._loaded.values() if only_bundled and not bundled
        ]
        if len(remaining) == len(self._loaded):
            return
        for name, table in self._original.items():
            self._embedding(name).set_value(table)
            own = self._tokenizers[name]
            length = own.tokenizer.model_max_length
            own.tokenizer, own.expansions = tokenizer_of(self._files[name], length), {}
        self._original, self._loaded = {}, {}
        self.add(remaining)

    def _embedding(self, component: str) -> Any:
        """The weight that embeds token ids."""
        encoder = self._encoders[component]
        return attrgetter(encoder.token_embedding)(encoder)
