"""Captions to token ids for the text encoders of a model."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxdiff.core.types import Int, NDArray
from jaxdiff.data.tokenizer import TextTokenizer, tokenize

# Columns of batches for each text encoder of a model, in the order of its family: token ids of
# captions, or cached hidden states, unless the model takes none of this encoder, with a mask of
# the tokens that are text where the model takes one; and the pooled embeddings that the model
# takes, those of several encoders side by side.
ID_COLUMNS = ("ids", "ids_2", "ids_3", "ids_4")
STATE_COLUMNS = ("states", "states_2", "states_3", "states_4")
MASK_COLUMNS = tuple(f"{name}_mask" for name in STATE_COLUMNS)  # 1: text, 0: padding
POOLED_COLUMN = "pooled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionTokenizer:
    """The tokenizers of a model, and replacements for captions or for tokens in them."""

    tokenizers: Mapping[str, TextTokenizer]  # by the name of their ids in a batch
    # captions -> other arrays by name, such as those of class labels
    columns: Callable[[Sequence[str]], Mapping[str, NDArray]] = lambda captions: {}
    caption: str | None = None  # in place of every caption
    placeholder_tokens: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # and their replacements

    def substitute(self, caption: str) -> str:
        """`caption` with its replacements."""
        text = caption if self.caption is None else self.caption
        for word, meaning in self.placeholder_tokens.items():
            text = text.replace(word, meaning)
        return text

    def __call__(self, captions: Sequence[str]) -> dict[str, Int[NDArray, "b ..."]]:
        """The ids of captions and what else is made of them, by name."""
        texts = [self.substitute(caption) for caption in captions]
        ids = {name: tokenize(each, texts) for name, each in self.tokenizers.items()}
        return ids | dict(self.columns(texts))
