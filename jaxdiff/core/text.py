"""Text files as editors and spreadsheets write them."""

import codecs

from jaxdiff.core.errors import InputError

# What a file may begin with; UTF-32's mark before UTF-16's, with which it begins.
ENCODINGS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32-LE",
    codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF16_LE: "UTF-16-LE",
    codecs.BOM_UTF16_BE: "UTF-16-BE",
}
MARK = "\ufeff"


class TextError(InputError):
    """A file of text that is none, from `line` on."""

    def __init__(self, source: str, line: int, found: str) -> None:
        super().__init__(
            f"{source}:{line}: got {found}, expected UTF-8, or UTF-16 with a byte order mark"
        )
        self.line = line


def decode_text(data: bytes, source: str) -> str:
    """The text of a file in UTF-8, or in the encoding of its byte order mark, without the mark.

    Lines end in "\\n", also those of Windows; marks at their beginnings, left by joining files, are
    removed. Raises TextError, an InputError with `source` and the line of what is no text.
    """
    mark = next((mark for mark in ENCODINGS if data.startswith(mark)), b"")
    encoding, body, wrong = ENCODINGS.get(mark, "UTF-8"), data[len(mark) :], ""
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        text = body[: error.start].decode(encoding)
        wrong = f"bytes that are not {encoding}"
    if "\0" in text:  # every second byte of UTF-16 without a mark
        text, wrong = text[: text.index("\0")], "a null byte"
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if wrong:
        raise TextError(source, 1 + text.count("\n"), wrong)
    return text.replace(f"\n{MARK}", "\n").removeprefix(MARK)
