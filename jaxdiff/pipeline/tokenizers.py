"""Tokenizers of the files that models have."""

import pathlib
import tempfile

from jaxdiff.checkpoints.tokenizers import TokenizerFiles, write_tokenizer
from jaxdiff.data.tokenizer import TextTokenizer, load_tokenizer


def tokenizer_of(files: TokenizerFiles, length: int | None = None) -> TextTokenizer:
    """The tokenizer that reads `files`, for texts of `length` tokens (None: what they say)."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder, files)
        tokenizer = load_tokenizer(folder, source="tokenizer", class_name=files.class_name)
    tokenizer.model_max_length = length or tokenizer.model_max_length
    return tokenizer
