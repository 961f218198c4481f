"""Tokenizers: of the files of CLIP, T5 and BERT, and CLIP's trained on captions.

transformers, which they are made of, is imported where one is made: that takes most of a second.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.text import decode_text
from jaxdiff.core.types import Int, NDArray
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.data.sentencepiece import read_sentencepiece

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
MAX_LENGTH = 32  # tokens, start and end included; the longest scene caption has 16
UNLIMITED = 1 << 20  # a model_max_length above this is transformers' way to say "not set"

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


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


def _class(name: str) -> Any:
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


def _build(merges: Sequence[tuple[str, str]], max_length: int) -> Any:
    """The CLIPTokenizer of `merges` with ids in CLIP's order.

    256 bytes, the same ending a word, merged pairs, start, end: the end token is the largest id.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + SUFFIX for symbol in symbols), *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    # The annotation of `merges` says strings; pairs are what the library's BPE model takes.
    pairs: Any = list(merges)
    return _class("CLIPTokenizer")(vocab=vocab, merges=pairs, model_max_length=max_length)


def train_tokenizer(
    captions: Iterable[str], vocab_size: int = 1024, max_length: int = MAX_LENGTH
) -> Any:
    """Byte-pair encoding learnt from `captions`, with at most `vocab_size` tokens.

    With room enough every word of the captions is one token; any other text still has an
    encoding. The same captions give the same tokenizer.
    """
    blank = _build([], max_length)
    room = int(in_range("vocab_size", vocab_size, len(blank), UNLIMITED)) - len(blank)
    in_range("max_length", max_length, 3, UNLIMITED)
    trained = Tokenizer(BPE(end_of_word_suffix=SUFFIX))
    trained.normalizer = blank.backend_tokenizer.normalizer
    trained.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix=SUFFIX,
        special_tokens=[],
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    return _build(_merges(trained)[:room], max_length)


def merges_of(tokenizer: TextTokenizer) -> list[tuple[str, str]]:
    """The pairs that a tokenizer joins to tokens, in their order."""
    return _merges(tokenizer.backend_tokenizer)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]


def save_tokenizer(tokenizer: TextTokenizer, folder: pathlib.Path) -> None:
    """Write the files of FILES, which every version of transformers reads, into `folder`."""
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = special | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    vocab = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    merges = [" ".join(pair) for pair in merges_of(tokenizer)]
    contents = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False, indent=0) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2, sort_keys=True) + "\n",
    }
    for name, text in contents.items():
        with atomic_file(folder / name) as part:
            part.write_text(text, encoding="utf-8")


# Of each class the file of its vocabulary in folders without tokenizer.json.
VOCABULARIES = {
    "CLIPTokenizer": "vocab.json",
    "T5Tokenizer": "spiece.model",
    "BertTokenizer": "vocab.txt",
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
        if name == "T5Tokenizer" and not whole:
            tokenizer = _t5(folder)
        else:
            tokenizer = _class(name).from_pretrained(str(folder), local_files_only=True)
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
    model = read_sentencepiece(folder / VOCABULARIES["T5Tokenizer"])
    if model.unknown != 2:
        raise InputError(
            f"{folder}: got the unknown piece at {model.unknown}, expected 2, as T5's models have"
        )
    settings, added = {}, {}
    for name, values in (("tokenizer_config.json", settings), ("added_tokens.json", added)):
        path = folder / name
        if path.is_file():
            values |= json.loads(decode_text(path.read_bytes(), str(path)))
    count = settings.get("extra_ids", 100)
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(count))]
    tokenizer = _class("T5Tokenizer")(
        vocab=[*model.pieces, *sentinels],
        _spm_precompiled_charsmap=model.characters or None,
        extra_ids=count,
        model_max_length=settings.get("model_max_length", UNLIMITED + 1),
    )
    tokenizer.add_tokens(sorted(added.keys() - tokenizer.get_vocab(), key=lambda t: added[t]))
    return tokenizer


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
