"""Tokenizers in files beside a single file, by the class of the text encoder that reads them."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from jaxdiff.checkpoints import glide_vocabulary, text_encoder_files
from jaxdiff.checkpoints.layout_glide import TEXT_MODEL
from jaxdiff.checkpoints.tokenizers import WHOLE, TokenizerFiles


@dataclass(frozen=True)
class FilesBeside:
    """How such files are found."""

    find: Callable[[pathlib.Path], TokenizerFiles | None]  # by the path of the single file
    wanted: Callable[[pathlib.Path, str], str]  # what is missing, for a path and a tokenizer's name
    names: str  # of the files, in words


BESIDE = {
    text_encoder_files.T5: FilesBeside(
        text_encoder_files.tokenizer_beside,
        text_encoder_files.tokenizer_wanted,
        f"T5's {text_encoder_files.VOCABULARY} or {WHOLE}",
    ),
    TEXT_MODEL: FilesBeside(
        glide_vocabulary.tokenizer_beside,
        glide_vocabulary.tokenizer_wanted,
        f"GPT-2's {glide_vocabulary.WANTED}",
    ),
}
