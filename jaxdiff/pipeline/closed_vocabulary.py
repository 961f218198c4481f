"""Out-of-vocabulary words, of models whose training captions had a closed vocabulary.

Every word of those captions is a single token, so that a word of several tokens was not in them.
"""

import re
import warnings
from collections.abc import Collection, Iterable

from jaxdiff.data.trained_tokenizer import SUFFIX, merges_of
from jaxdiff.pipeline.prompts import PromptTokenizer, WeightedText, parse_syntax

WORDS = re.compile(r"[^\W\d_]+|[^\x00-\x7f\w\s]")  # and symbols such as emoji


def warn_out_of_vocabulary(
    tokenizer: PromptTokenizer,
    texts: Iterable[str | None],
    *,
    syntax: bool,
    added: Collection[str] = (),
) -> None:
    """One warning that names the out-of-vocabulary words of `texts`, and those of the vocabulary.

    `added` are the tokens of textual inversions.
    """
    own = [text for text in dict.fromkeys(texts) if text is not None]
    parsed = [parse_syntax(text) if syntax else [WeightedText(text, 1)] for text in own]
    pieces = [piece.text or "" for each in parsed for piece in each]
    words = dict.fromkeys(w for piece in pieces for w in WORDS.findall(piece.lower()))
    unseen = [word for word in words if len(tokenizer.ids(word)) > 1 and word not in added]
    if unseen:
        message = (
            f"prompt: this model was not trained on {', '.join(map(repr, unseen))}; "
            f"it knows {', '.join(whole_words(tokenizer))}"
        )
        warnings.warn(message, stacklevel=2)


def whole_words(tokenizer: PromptTokenizer) -> list[str]:
    """The words that are one token, in alphabetical order, as far as merges tell them.

    A token that other tokens end in is taken for a part of words.
    """
    merges = merges_of(tokenizer.tokenizer)
    ends = {"".join(pair) for pair in merges} - {right for _, right in merges}
    return sorted(token.removesuffix(SUFFIX) for token in ends if token.endswith(SUFFIX))
