"""Validators for the boundary where a user's values arrive; each returns its value or raises."""

import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeVar

from jaxdiff.core.errors import InputError
from jaxdiff.core.names_elsewhere import did_you_mean

T = TypeVar("T")
Number = TypeVar("Number", int, float)


def positive(name: str, value: Number) -> Number:
    """Return `value` if it is a finite number above zero."""
    if not (_is_number(value) and math.isfinite(value) and value > 0):
        raise InputError(f"{name}: got {_shown(value)}, expected a number above 0")
    return value


def non_negative(name: str, value: Number) -> Number:
    """Return `value` if it is a finite number of at least zero."""
    if not (_is_number(value) and math.isfinite(value) and value >= 0):
        raise InputError(f"{name}: got {_shown(value)}, expected a number of at least 0")
    return value


def in_range(name: str, value: Number, low: float, high: float) -> Number:
    """Return `value` if low <= value <= high."""
    if not (_is_number(value) and low <= value <= high):
        raise InputError(f"{name}: got {_shown(value)}, expected a number from {low} to {high}")
    return value


def multiple_of(name: str, value: int, factor: int) -> int:
    """Return `value` if it is a multiple of `factor` above zero; the error names the nearest."""
    if value <= 0 or value % factor:
        low = max(value // factor, 1) * factor
        kind = "multiple" if value > 0 else "positive multiple"
        such = f"{low} or {low + factor}"
        raise InputError(f"{name}: got {value}, expected a {kind} of {factor} such as {such}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return str(value) if _is_number(value) else f"{value!r:.80}"


def one_of(name: str, value: T, choices: Iterable[T]) -> T:
    """Return `value` if it is among `choices`; the error proposes the nearest spelling."""
    known = list(choices)
    if value in known:
        return value
    names = [str(choice) for choice in known]
    hint = did_you_mean(str(value), names)
    raise InputError(f"{name}: got {value!r}, expected one of {', '.join(names)}{hint}")


def check_shape(name: str, array: Any, expected: tuple[int | None, ...]) -> Any:
    """Return `array` if its shape is `expected`, where None stands for any length."""
    if not hasattr(array, "shape"):
        raise InputError(f"{name}: got {array!r:.80}, expected an array")
    got = tuple(array.shape)
    fits = len(got) == len(expected) and all(
        e is None or g == e for g, e in zip(got, expected, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join("any" if e is None else str(e) for e in expected) + ")"
        raise InputError(f"{name}: got shape {got}, expected {wanted}")
    return array
