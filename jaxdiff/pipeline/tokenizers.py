"""Tokenizers of the files that models have."""

import pathlib
import tempfile
from typing import Any

from jaxdiff.checkpoints.tokenizers import TokenizerFiles, write_tokenizer
from jaxdiff.data.tokenizer import load_tokenizer


def tokenizer_of(files: TokenizerFiles, length: int | None = None) -> Any:
    """The tokenizer that reads `files`, for texts of `length` tokens (None: what they say)."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder, files)
        tokenizer = load_tokenizer(folder, source="tokenizer")
    tokenizer.model_max_length = length or tokenizer.model_max_length
    return tokenizer
