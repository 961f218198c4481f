"""How captions become what the text encoders of a model read."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxdiff.core.types import Int, NDArray
from jaxdiff.data.tokenizer import CLIPTokenizer, tokenize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """The tokenizers of a model, and what stands for captions or for words in them."""

    tokenizers: Mapping[str, CLIPTokenizer]  # by the name of their ids in a batch
    caption: str | None = None  # in place of every caption
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)  # and what is read for each

    def spelled(self, caption: str) -> str:
        """What is read for `caption`."""
        text = caption if self.caption is None else self.caption
        for word, meaning in self.words.items():
            text = text.replace(word, meaning)
        return text

    def __call__(self, captions: Sequence[str]) -> dict[str, Int[NDArray, "b _"]]:
        """The ids of captions, by name."""
        texts = [self.spelled(caption) for caption in captions]
        return {name: tokenize(each, texts) for name, each in self.tokenizers.items()}
