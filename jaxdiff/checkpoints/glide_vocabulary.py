"""GLIDE's vocabulary in files beside a checkpoint: GPT-2's byte pairs, of which no file of tensors
has any. Texts are read in lower case; the last token fills short ones.
"""

import gzip
import json
import pathlib
import zlib

from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.checkpoints.tokenizers import CLASSES, SETTINGS, TokenizerFiles, read_file
from jaxdiff.core.errors import InputError

TOKENIZER = "GPT2Tokenizer"
NAMES = CLASSES[TOKENIZER]
# The same files in the original repository.
ORIGINAL_NAMES = ("encoder.json", "vocab.bpe")
PAIRS = (NAMES, ORIGINAL_NAMES, tuple(f"{name}.gz" for name in ORIGINAL_NAMES))
WANTED = " and ".join(NAMES)
END = "<|endoftext|>"
LENGTH = 128  # tokens of a text


def tokenizer_beside(path: pathlib.Path) -> TokenizerFiles | None:
    """The tokenizer whose two files are in the folder of the file at `path`; None without them.

    Raises InputError for the vocabulary of another tokenizer.
    """
    for names in PAIRS:
        vocabulary, merges = (path.with_name(name) for name in names)
        if not (vocabulary.is_file() and merges.is_file()):
            continue
        data = _read(vocabulary)
        tokens = parse_object(data, str(vocabulary))
        last = max(tokens, key=lambda token: tokens[token], default=None)
        if last != END or any(token.endswith("</w>") for token in tokens):
            raise InputError(f"{vocabulary}: got the vocabulary of another model, expected GLIDE's")
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
        settings = {"tokenizer_class": TOKENIZER, "model_max_length": LENGTH, **special}
        files = {NAMES[0]: data, NAMES[1]: _read(merges)}
        files[SETTINGS[0]] = json.dumps(settings, indent=2).encode()
        return TokenizerFiles(class_name=TOKENIZER, files=files)
    return None


def tokenizer_wanted(path: pathlib.Path, name: str) -> str:
    """What has the tokenizer, in words: the missing files of the pair that is most complete."""
    missing = [[each for each in pair if not path.with_name(each).is_file()] for pair in PAIRS]
    fewest = min(missing, key=len)
    del name
    return (
        f"{' and '.join(fewest)} in {path.parent} (GPT-2's vocabulary: {WANTED}, or "
        f"{' and '.join(ORIGINAL_NAMES)} of GLIDE's repository, with or without .gz)"
    )


def _read(path: pathlib.Path) -> bytes:
    """The bytes of a file, which may be compressed."""
    if path.suffix != ".gz":
        return read_file(path)
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: got {error}, expected a file of a tokenizer") from None
