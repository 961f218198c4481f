"""The notation of a choice with options, NAME:OPTION=VALUE,..., such as "ddim:eta=0.5"."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of

T = TypeVar("T")
IMAGES = ("image", "original_image", "mask", "hint")  # options of models that may be files
_FLAGS = {"true": True, "false": False}


def split_options(kind: str, text: str) -> tuple[str, dict[str, str]]:
    """Name and options in `text`, which describes a choice of that `kind`; raises InputError."""
    name, _, options = text.strip().partition(":")
    pairs = [pair.partition("=") for pair in options.split(",") if pair]
    for key, equals, value in pairs:
        if not (equals and value):
            raise InputError(f"{kind}: {name}: got {key + equals!r}, expected OPTION=VALUE")
    found = {key.strip(): value.strip() for key, _, value in pairs}
    if len(found) < len(pairs):
        raise InputError(f"{kind}: {name}: got {options!r}, expected each option once")
    return name.strip(), found


def model_and_options(kind: str, text: str) -> tuple[str, dict[str, str]]:
    """The model and the options in MODEL or MODEL:NAME=VALUE,NAME=VALUE; raises InputError."""
    found = re.search(r":(?=\w+=)", text)
    if found is None:
        return text, {}
    return text[: found.start()], split_options(kind, text[found.start() :])[1]


def with_options(kind: str, name: str, choice: T, options: Mapping[str, str]) -> T:
    """`choice`, a dataclass, with `options` converted to the types of its fields.

    Fields that its `internal` names are no options. Raises InputError.
    """
    internal = getattr(choice, "internal", ())
    fields: Any = dataclasses.fields(choice)  # pyright: ignore[reportArgumentType]
    known = {f.name: type(getattr(choice, f.name)) for f in fields if f.name not in internal}
    values: dict[str, Any] = {}
    for key, text in options.items():
        if not known:
            raise InputError(f"{kind}: {name}: got {key!r}, expected no options")
        type_ = known[one_of(f"{kind}: {name}", key, known)]
        try:
            values[key] = _FLAGS[text.lower()] if type_ is bool else type_(text)
        except (ValueError, KeyError):
            expected = {bool: "true or false", int: "an integer", float: "a number"}[type_]
            raise InputError(f"{kind}: {key}: got {text!r}, expected {expected}") from None
    return dataclasses.replace(choice, **values)  # pyright: ignore[reportArgumentType]
