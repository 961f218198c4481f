"""CLIP's tokenizer trained on captions, and written."""

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from jaxdiff.core.atomic import atomic_file
from jaxdiff.core.validate import in_range
from jaxdiff.data.tokenizer import UNLIMITED, TextTokenizer, tokenizer_class

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
MAX_LENGTH = 32  # tokens, start and end included; the longest scene caption has 16
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def _build(merges: Sequence[tuple[str, str]], max_length: int) -> Any:
    """The CLIPTokenizer of `merges` with ids in CLIP's order.

    256 bytes, the same ending a word, merged pairs, start, end: the end token is the largest id.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + SUFFIX for symbol in symbols), *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    # The annotation of `merges` says strings; pairs are what the library's BPE model takes.
    pairs: Any = list(merges)
    return tokenizer_class("CLIPTokenizer")(vocab=vocab, merges=pairs, model_max_length=max_length)


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
    return _build(_pairs(trained)[:room], max_length)


def merges_of(tokenizer: TextTokenizer) -> list[tuple[str, str]]:
    """The pairs that a tokenizer joins to tokens, in their order."""
    return _pairs(tokenizer.backend_tokenizer)


def _pairs(tokenizer: Tokenizer) -> list[tuple[str, str]]:
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
