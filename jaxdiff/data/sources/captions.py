"""Captions: where they are stored beside images, and what counts as one.

A text file is a caption as a whole, a row of a table or a JSON object has it under a key.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxdiff.core.text import MARK, TextError, decode_text
from jaxdiff.data.bad_samples import BadSampleError

# Files beside NAME.png or in a tar, the first that there is counts: NAME.txt, ...
TEXT_FILES = (".txt", ".caption")
JSON_FILE = ".json"
CAPTION_FILES = (*TEXT_FILES, JSON_FILE)
DEFAULT_KEY, OTHER_KEYS = "text", ("caption", "prompt")
NO_CAPTION, EMPTY = "without caption", "empty caption"
NOT_UTF8, BAD_JSON = "caption that is not UTF-8", "caption file that is not a JSON object"
SEVERAL = "captions under several keys (data.caption_key names one)"


def clean_caption(caption: str) -> str:
    """`caption` without blanks around it; BadSampleError if nothing is left."""
    stripped = caption.strip().strip(MARK).strip()
    if not stripped:
        raise BadSampleError(EMPTY)
    return stripped


def caption_of(row: Mapping[str, Any], key: str) -> str:
    """The caption in a row of a table or a JSON object, under `key`; of a list the first counts.

    Where the default key is missing, that of OTHER_KEYS which is there. BadSampleError without a
    caption, or with several.
    """
    value = row.get(key)
    if value is None and key == DEFAULT_KEY:
        others = [row[name] for name in OTHER_KEYS if row.get(name)]
        if len(others) > 1 and others[0] != others[1]:
            raise BadSampleError(SEVERAL)
        value = others[0] if others else None
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str):
        raise BadSampleError(NO_CAPTION)
    return clean_caption(value)


def read_caption(data: bytes, source: str, key: str = DEFAULT_KEY, *, is_json: bool = False) -> str:
    """The caption in a file, `source` its name, `key` that in JSON; BadSampleError without one."""
    try:
        text = decode_text(data, source)
    except TextError as error:
        raise BadSampleError(NOT_UTF8, where=f"{source}:{error.line}") from None
    if not is_json:
        return clean_caption(text)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise BadSampleError(BAD_JSON)
    return caption_of(row, key)
