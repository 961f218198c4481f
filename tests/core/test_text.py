"""Text of files: encodings by their marks, line ends, and where bytes are no text."""

import pathlib
import re

import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.core.text import decode_text

PACKAGE = pathlib.Path(__file__).parents[2] / "jaxdiff"
# What decodes otherwise: files that this program alone writes, or that come with it; a compiler's
# output; strings that are not files.
OTHERS = {
    "generation/openai_batch.py",  # base64
    "serve/access.py",  # base64
    "checkpoints/clip_vocabulary.py",
    "checkpoints/flax_msgpack.py",
    "cli/progress.py",
    "data/sentencepiece.py",
    "experiments/loggers.py",
    "generation/manifest.py",
    "pipeline/notebook.py",
    "planning/kernel_bundles.py",
}
TEXT = "a red star\ncafé ✓ 🙂\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_the_mark_says_the_encoding_and_is_no_text(encoding):
    data = ("\ufeff" + TEXT.replace("\n", "\r\n")).encode(encoding)
    assert decode_text(data, "x") == TEXT


def test_without_a_mark_it_is_utf_8_with_any_line_ends():
    assert decode_text(TEXT.encode(), "x") == TEXT
    assert decode_text(b"a\rb\r\nc", "x") == "a\nb\nc"
    assert decode_text(b"", "x") == ""


def test_marks_between_joined_files_are_removed():
    assert decode_text(b"\xef\xbb\xbfa\r\n\xef\xbb\xbfb\n", "x") == "a\nb\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\r\ncafé".encode("latin-1"), "^x:2: got bytes that are not UTF-8, expected UTF-8, or"),
        ("a\nb\n".encode("utf-16-le"), "^x:1: got a null byte, expected UTF-8, or UTF-16 with a"),
        (b"\xff\xfea\0\n\0\x00\xd8", "^x:2: got bytes that are not UTF-16-LE"),
    ],
)
def test_what_is_no_text_is_named_by_its_line(data, message):
    with pytest.raises(InputError, match=message):
        decode_text(data, "x")


def test_there_is_no_other_way_to_read_text():
    reads = re.compile(r"read_text\(|\bdata\.decode\(|\)\.decode\((\"utf|\))|open\(encoding")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if reads.search(path.read_text())
    }
    assert found == OTHERS
