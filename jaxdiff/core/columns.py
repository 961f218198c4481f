"""Options of several images: one value for all of them, or a sequence with one for each."""

from collections.abc import Mapping
from typing import Any

from jaxdiff.core.errors import InputError


def is_single(value: Any) -> bool:
    """Whether `value` is one for all images, and no sequence."""
    return not isinstance(value, list | tuple | range) and getattr(value, "ndim", 0) == 0


def column_length(columns: Mapping[str, Any]) -> int:
    """The number of images: the length of the longest column, 1 without any.

    InputError for an empty one.
    """
    lengths = {name: len(column) for name, column in columns.items() if not is_single(column)}
    if 0 in lengths.values():
        raise InputError(f"{min(lengths, key=lengths.__getitem__)}: got nothing, expected entries")
    return max(lengths.values(), default=1)


def as_column(name: str, value: Any, count: int) -> tuple[Any, ...]:
    """`value` as one entry for each of `count` images; InputError for another number of them."""
    entries = (value,) * count if is_single(value) else tuple(value)
    if len(entries) == 1:
        entries *= count
    if len(entries) != count:
        raise InputError(f"{name}: got {len(entries)} entries, expected 1 or {count}")
    return entries
