"""Tokenizers of the files that models have."""

import pathlib
import tempfile

from tokenizers.normalizers import Lowercase, Sequence, Strip

from jaxdiff.checkpoints.tokenizers import TokenizerFiles, write_tokenizer
from jaxdiff.data.tokenizer import TextTokenizer, load_tokenizer


def tokenizer_of(
    files: TokenizerFiles, length: int | None = None, *, lowercases: bool = False
) -> TextTokenizer:
    """The tokenizer that reads `files`, for texts of `length` tokens (None: what they say).

    With `lowercases` it reads texts in lower case, and without space around them unless a space
    is part of its tokens.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder, files)
        tokenizer = load_tokenizer(folder, source="tokenizer", class_name=files.class_name)
    tokenizer.model_max_length = length or tokenizer.model_max_length
    if lowercases:
        backend = tokenizer.backend_tokenizer
        own = [] if backend.normalizer is None else [backend.normalizer]
        # GPT-2's words begin with the space before them, which is part of a token.
        strip = [] if files.class_name.startswith("GPT2") else [Strip()]
        backend.normalizer = Sequence([Lowercase(), *strip, *own])
    return tokenizer
