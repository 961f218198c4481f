"""Tokenizers of the files of CLIP, T5, XLM-RoBERTa, BERT and GPT-2.

transformers, which they are made of, is imported where one is made: that takes most of a second.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.text import decode_text
from jaxdiff.core.types import Int, NDArray
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.data.sentencepiece import SentencePieceModel, read_sentencepiece

UNLIMITED = 1 << 20  # a model_max_length above this is transformers' way to say "not set"


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keep transformers from announcing on import that there is no PyTorch; warnings still show."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def tokenizer_class(name: str) -> Any:
    """A class of transformers."""
    with _without_advice():
        import transformers

        return getattr(transformers, name)


@runtime_checkable
class TextTokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    model_max_length: int  # tokens of a text, start and end included
    pad_token_id: int
    unk_token_id: int
    backend_tokenizer: Any  # of the `tokenizers` library

    def __len__(self) -> int:
        """The number of tokens, added ones included."""
        ...

    def __call__(self, text: Any, **options: Any) -> Any:
        """A mapping with "input_ids" of a text, or of each of several."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """The id of each token."""
        ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or of each of several."""
        ...

    def add_tokens(self, new_tokens: Any) -> int:
        """Add tokens, which are then found as a whole."""
        ...


SETTINGS = "tokenizer_config.json"
# Of each class the file of its vocabulary in folders without tokenizer.json.
VOCABULARIES = {
    "CLIPTokenizer": "vocab.json",
    "T5Tokenizer": "spiece.model",
    "XLMRobertaTokenizer": "sentencepiece.bpe.model",
    "BertTokenizer": "vocab.txt",
    "GPT2Tokenizer": "vocab.json",
}


def load_tokenizer(
    folder: pathlib.Path, source: str | None = None, *, class_name: str = "CLIPTokenizer"
) -> Any:
    """The `TextTokenizer` of a folder with a file of VOCABULARIES or tokenizer.json.

    Raises InputError, which begins with `source` (None: the folder), for files that are no such,
    and for a class that is none of VOCABULARIES (nor one of them and "Fast").
    """
    name = one_of("tokenizer class", class_name.removesuffix("Fast"), VOCABULARIES)
    vocabulary, whole = folder / VOCABULARIES[name], (folder / "tokenizer.json").is_file()
    if not whole and not vocabulary.is_file():
        raise InputError(
            f"{folder}: got no tokenizer, expected {vocabulary.name} or tokenizer.json"
        )
    try:
        if name in _SENTENCEPIECE and not whole:
            tokenizer = _SENTENCEPIECE[name](folder)
        else:
            tokenizer = tokenizer_class(name).from_pretrained(str(folder), local_files_only=True)
        tokenizer(str(tokenizer.unk_token_id))  # to see that it works
        return tokenizer
    except InputError:
        raise
    except Exception as error:  # of what class says only the content of the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source or folder}: got files that are no tokenizer ({reason:.120}), expected those "
            f"of {name.removesuffix('Tokenizer')}'s tokenizer"
        ) from None


def _t5(folder: pathlib.Path) -> Any:
    """T5's tokenizer of spiece.model: its pieces, and behind them the sentinels, the last first."""
    model = _pieces(folder, "T5Tokenizer", unknown=2)
    settings, added = (_json(folder / name) for name in (SETTINGS, "added_tokens.json"))
    count = settings.get("extra_ids", 100)
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(count))]
    tokenizer = tokenizer_class("T5Tokenizer")(
        vocab=[*model.pieces, *sentinels],
        _spm_precompiled_charsmap=model.characters or None,
        extra_ids=count,
        model_max_length=settings.get("model_max_length", UNLIMITED + 1),
    )
    tokenizer.add_tokens(sorted(added.keys() - tokenizer.get_vocab(), key=lambda t: added[t]))
    return tokenizer


def _xlm_roberta(folder: pathlib.Path) -> Any:
    """XLM-RoBERTa's tokenizer of sentencepiece.bpe.model, which has pieces from the id 4 on."""
    model = _pieces(folder, "XLMRobertaTokenizer", unknown=0)
    first = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return tokenizer_class("XLMRobertaTokenizer")(
        vocab=[*first, *model.pieces[3:], ("<mask>", 0.0)],
        _spm_precompiled_charsmap=model.characters or None,
        model_max_length=_json(folder / SETTINGS).get("model_max_length", UNLIMITED + 1),
    )


_SENTENCEPIECE = {"T5Tokenizer": _t5, "XLMRobertaTokenizer": _xlm_roberta}


def _pieces(folder: pathlib.Path, name: str, *, unknown: int) -> SentencePieceModel:
    """The model of the class `name`; InputError unless its unknown piece is at `unknown`."""
    model = read_sentencepiece(folder / VOCABULARIES[name])
    if model.unknown != unknown:
        raise InputError(
            f"{folder}: got the unknown piece at {model.unknown}, expected {unknown}, as "
            f"{name.removesuffix('Tokenizer')}'s models have"
        )
    return model


def _json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file."""
    return json.loads(decode_text(path.read_bytes(), str(path))) if path.is_file() else {}


def tokenize(tokenizer: TextTokenizer, texts: Sequence[str]) -> Int[NDArray, "b n"]:
    """Ids of `texts` as int32: start, text, end, padding up to the tokenizer's model_max_length.

    Longer texts are cut, keeping the end token; `truncated` counts what is lost.
    """
    in_range("model_max_length", tokenizer.model_max_length, 2, UNLIMITED)
    encoded = tokenizer(list(texts), padding="max_length", truncation=True)
    return np.array(encoded["input_ids"], np.int32).reshape(len(texts), -1)


def truncated(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[int]:
    """How many tokens `tokenize` cuts from each text; callers warn about what is not 0."""
    encoded = tokenizer(list(texts), truncation=False, verbose=False)
    return [max(0, len(ids) - tokenizer.model_max_length) for ids in encoded["input_ids"]]
