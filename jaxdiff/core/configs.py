"""Dataclass configs to and from JSON mappings, strictly: an unknown field is an error."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of

C = TypeVar("C")


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value


def from_mapping(cls: type[C], mapping: Mapping[str, Any], *, source: str) -> C:
    """Build dataclass `cls` from a JSON mapping read from `source` (a file name for the errors).

    Lists become tuples and keys that begin with `_` (such as `_class_name`) are skipped.
    Raises InputError for an unknown or a missing field.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values = {k: _as_tuple(v) for k, v in mapping.items() if not k.startswith("_")}
    for name in values:
        one_of(f"{source}: field", name, fields)
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{source}: got no field {missing[0]!r}, expected it for {cls.__name__}")
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """The JSON mapping of a dataclass; `from_mapping` reads it back as an equal config."""
    return dataclasses.asdict(config)
