"""The words that a pipeline knows: its tokenizers' own, and those that textual inversion adds."""

import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.checkpoints.textual_inversion import Inversion
from jaxdiff.checkpoints.tokenizers import TokenizerFiles, write_tokenizer
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float, NDArray
from jaxdiff.data.tokenizer import SUFFIX, load_tokenizer, merges_of
from jaxdiff.models.clip import CLIPTextModel, extend_token_embedding


class TextualInversionTokenizer:
    """A tokenizer and the text encoder that reads its ids.

    A word of several vectors is several ids, which its first one stands for.
    """

    def __init__(self, files: TokenizerFiles, encoder: CLIPTextModel) -> None:
        self._files = files
        self._encoder = encoder
        self._original: Array | None = None
        self._meanings: dict[int, list[int]] = {}
        self.tokenizer = tokenizer_of(files)
        comma = self.tokenizer.convert_tokens_to_ids(",</w>")
        self.comma = None if comma == self.tokenizer.unk_token_id else comma
        self.added_tokens: tuple[str, ...] = ()

    def ids(self, text: str) -> list[int]:
        """The ids of `text`, without start and end."""
        plain = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [part for token in plain for part in self._meanings.get(token, [token])]

    def unseen(self, text: str) -> list[str]:
        """The words of `text` that are several tokens, those that were added left out."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
        return [word for word in words if len(self.ids(word)) > 1 and word not in self.added_tokens]

    def whole_words(self) -> list[str]:
        """The words that are one token, in alphabetical order, as far as merges tell them.

        A token that other tokens end in is taken for a part of words.
        """
        merges = merges_of(self.tokenizer)
        ends = {"".join(pair) for pair in merges} - {right for _, right in merges}
        return sorted(token.removesuffix(SUFFIX) for token in ends if token.endswith(SUFFIX))

    def has_token(self, word: str) -> bool:
        """Whether `word` is a token already."""
        return word in self.tokenizer.get_vocab()

    def add(self, word: str, vectors: Float[NDArray, "n d"]) -> None:
        """Add a token with the embeddings `vectors` (n, d)."""
        first = len(self.tokenizer)
        self.tokenizer.add_tokens([word, *(f"{word}_{i}" for i in range(1, len(vectors)))])
        own = self.tokenizer.convert_tokens_to_ids(word)
        if own != first:
            raise InputError(
                f"token: got {word!r}, expected a text that is one token after it is added"
            )
        self._meanings[first] = list(range(first, first + len(vectors)))
        self.added_tokens = (*self.added_tokens, word)
        embedding = self._encoder.text_model.embeddings.token_embedding.embedding
        table = embedding[...]
        if self._original is None:
            self._original = table
        longer = extend_token_embedding(table, first, jnp.asarray(vectors))
        embedding.set_value(jax.device_put(longer, table.sharding))

    def reset(self) -> None:
        """Remove all added tokens."""
        if self._original is not None:
            embedding = self._encoder.text_model.embeddings.token_embedding.embedding
            embedding.set_value(self._original)
        self._original, self._meanings, self.added_tokens = None, {}, ()
        self.tokenizer = tokenizer_of(self._files)


def add_inversion(
    vocabularies: Mapping[str, TextualInversionTokenizer], inversion: Inversion
) -> None:
    """Add a token to all of a pipeline's tokenizers; InputError if one of them has it."""
    word = inversion.token
    if not word or any(c.isspace() or c in "()[]\\" for c in word):
        raise InputError(f"token: got {word!r}, expected a token without spaces and brackets")
    for vocabulary in vocabularies.values():
        if vocabulary.has_token(word):
            raise InputError(
                f"token: got {word!r}, which the tokenizer already has, expected a new token"
            )
    for name, vocabulary in vocabularies.items():
        vocabulary.add(word, inversion.vectors[name])


def tokenizer_of(files: TokenizerFiles) -> Any:
    """The tokenizer that reads `files`."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder, files)
        return load_tokenizer(folder)
