"""Tokenizer folders, kept as the files that they are, so that saving changes nothing."""

import hashlib
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.core.errors import InputError, os_error_message
from jaxdiff.core.text import decode_text
from jaxdiff.core.validate import one_of

# Either one file says all, or those of the class do; the rest are settings.
WHOLE = "tokenizer.json"
CLASSES = {
    "CLIPTokenizer": ("vocab.json", "merges.txt"),
    "T5Tokenizer": ("spiece.model",),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model",),
    "BertTokenizer": ("vocab.txt",),
    "GPT2Tokenizer": ("vocab.json", "merges.txt"),
}
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BINARY = ".model"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer folder: the class that it is for, and its files by name."""

    class_name: str
    files: Mapping[str, bytes]


def read_tokenizer(
    folder: pathlib.Path, *, class_name: str | None = None, source: str = "tokenizer"
) -> TokenizerFiles:
    """The files of a tokenizer's folder.

    `source` names what asked for `class_name`, which is one of CLASSES, or one of them and "Fast";
    None: the class whose files are there, or that tokenizer_config.json names. Raises InputError
    for another class, a missing file, or one that is no JSON where it should be.
    """
    name = _class_name(folder) if class_name is None else class_name
    parts = CLASSES[one_of(f"{source}: class", name.removesuffix("Fast"), CLASSES)]
    names = [n for n in (WHOLE, *parts, *SETTINGS) if (folder / n).is_file()]
    if WHOLE not in names and not set(parts) <= set(names):
        got = ", ".join(names) or "no tokenizer files"
        raise InputError(f"{folder}: got {got}, expected {' and '.join(parts)}")
    return TokenizerFiles(class_name=name, files={name: read_file(folder / name) for name in names})


def _class_name(folder: pathlib.Path) -> str:
    """The class that a tokenizer's folder is for; CLIP's if nothing says it.

    Where the files are those of several classes, as CLIP's and GPT-2's are, the settings say it.
    """
    settings = folder / SETTINGS[0]
    fits = [c for c, parts in CLASSES.items() if all((folder / part).is_file() for part in parts)]
    if len(fits) == 1:
        return fits[0]
    raw = parse_object(read_file(settings), str(settings)) if settings.is_file() else {}
    named = str(raw.get("tokenizer_class", next(iter(CLASSES))))
    return named if not fits or named.removesuffix("Fast") in fits else fits[0]


def tokenizer_digest(tokenizer: TokenizerFiles) -> str:
    """A fingerprint of all files of a tokenizer."""
    files = sorted(tokenizer.files.items())
    parts = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def write_tokenizer(folder: pathlib.Path, tokenizer: TokenizerFiles) -> None:
    """Write the tokenizer's files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)


def read_file(path: pathlib.Path) -> bytes:
    """The bytes of a tokenizer's file, text in UTF-8; InputError for one that cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: got {os_error_message(error)}, expected a tokenizer file"
        ) from None
    if data.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: got a Git LFS pointer, expected the file itself (run `git lfs pull`)"
        )
    if path.suffix == BINARY:
        return data
    plain = decode_text(data, str(path)).encode()
    if path.suffix == ".json":
        parse_object(plain, str(path))
    # As it is, unless it has a byte order mark or another encoding, which no tokenizer reads.
    return data if data.replace(b"\r\n", b"\n") == plain else plain
