"""CLIP byte-pair tokenizers: trained on captions, kept as ordinary CLIPTokenizer files, applied."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Int, NDArray
from jaxdiff.core.validate import in_range

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


with _without_advice():
    from transformers import CLIPTokenizer


def _build(merges: Sequence[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    """The tokenizer of `merges` with ids in CLIP's order.

    256 bytes, the same ending a word, merged pairs, start, end: the end token is the largest id.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + SUFFIX for symbol in symbols), *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    # The annotation of `merges` says strings; pairs are what the library's BPE model takes.
    pairs: Any = list(merges)
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=max_length)


def train_tokenizer(
    captions: Iterable[str], vocab_size: int = 1024, max_length: int = MAX_LENGTH
) -> CLIPTokenizer:
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


def merges_of(tokenizer: CLIPTokenizer) -> list[tuple[str, str]]:
    """The pairs that a tokenizer joins to tokens, in their order."""
    return _merges(tokenizer.backend_tokenizer)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]


def save_tokenizer(tokenizer: CLIPTokenizer, folder: pathlib.Path) -> None:
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


def load_tokenizer(folder: pathlib.Path, source: str | None = None) -> CLIPTokenizer:
    """The tokenizer of a folder with vocab.json and merges.txt, or with tokenizer.json.

    Raises InputError, which begins with `source` (None: the folder), for files that are no such.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise InputError(f"{folder}: got no tokenizer, expected vocab.json or tokenizer.json")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer(str(tokenizer.unk_token_id))  # to see that it works
        return tokenizer
    except Exception as error:  # of what class says only the content of the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source or folder}: got files that are no tokenizer ({reason:.120}), expected those "
            "of CLIP's tokenizer"
        ) from None


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Int[NDArray, "b n"]:
    """Ids of `texts` as int32: start, text, end, padding up to the tokenizer's model_max_length.

    Longer texts are cut, keeping the end token; `truncated` counts what is lost.
    """
    in_range("model_max_length", tokenizer.model_max_length, 3, UNLIMITED)
    encoded = tokenizer(list(texts), padding="max_length", truncation=True)
    return np.array(encoded["input_ids"], np.int32).reshape(len(texts), -1)


def truncated(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[int]:
    """How many tokens `tokenize` cuts from each text; callers warn about what is not 0."""
    encoded = tokenizer(list(texts), truncation=False, verbose=False)
    return [max(0, len(ids) - tokenizer.model_max_length) for ids in encoded["input_ids"]]
