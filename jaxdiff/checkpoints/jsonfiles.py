"""JSON objects on disk, read with errors that name the file."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxdiff.core.errors import InputError, os_error_message
from jaxdiff.core.text import decode_text


def parse_object(data: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `data`; an InputError names `source` for anything else.

    A key that occurs twice is refused too: readers disagree on which of the two counts.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{source}: got the key {twice!r} twice, expected it once")
        return table

    try:
        value = json.loads(decode_text(data, source), object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: got invalid JSON ({error}), expected an object") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: got a JSON {type(value).__name__}, expected an object")
    return value


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in the file at `path`; InputError if it is missing or something else."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: got {os_error_message(error)}, expected a JSON file") from None
    return parse_object(data, str(path))


def write_object(path: pathlib.Path, mapping: Mapping[str, Any]) -> None:
    """Write `mapping` to `path` as diffusers and transformers lay it out: sorted, two spaces."""
    path.write_text(json.dumps(mapping, indent=2, sort_keys=True) + "\n", encoding="utf-8")
