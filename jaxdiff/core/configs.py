"""Dataclass configs to and from JSON mappings, strictly: unknown fields and types are errors."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Container, Iterator, Mapping
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of

C = TypeVar("C")

_JSON: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
}


def check_unsupported(config: Any) -> None:
    """InputError for a field whose value is none of those that its class lists as UNSUPPORTED."""
    for name, accepted in config.UNSUPPORTED.items():
        one_of(name, getattr(config, name), accepted)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value


def from_mapping(cls: type[C], mapping: Mapping[str, Any], *, source: str) -> C:
    """Build dataclass `cls` from a JSON mapping read from `source` (a file name for the errors).

    Lists become tuples and keys that begin with `_` (such as `_class_name`) are skipped.
    Raises InputError for an unknown or a missing field and for a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    hints = get_type_hints(cls)
    values = {k: v for k, v in mapping.items() if not k.startswith("_")}
    for name, value in values.items():
        one_of(f"{source}: field", name, fields)
        values[name] = typed(f"{source}: {name}", value, hints[name])
    _check_complete(cls, values, source)
    return cls(**values)


def _check_complete(cls: type[Any], names: Container[str], source: str) -> None:
    """InputError for a field of dataclass `cls` that has no default and is not among `names`."""
    for field in dataclasses.fields(cls):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name not in names and not has_default:
            raise InputError(f"{source}: got no field {field.name!r}, expected one")


def from_mapping_recursive(cls: type[C], mapping: Mapping[str, Any], *, source: str) -> C:
    """The dataclass whose `to_mapping` this is, dataclasses in its fields included.

    Where a field may be one of several, it is the one whose fields are there. InputError for
    fields of none.
    """
    return _decode_value(cls, mapping, source)


def _decode_value(hint: Any, value: Any, source: str) -> Any:
    """`value` as what a field of the type `hint` holds."""
    if not isinstance(value, Mapping):
        return _as_tuple(value)
    choices = [c for c in (hint, *get_args(hint)) if dataclasses.is_dataclass(c)]
    names = {c: {field.name for field in dataclasses.fields(c)} for c in choices}
    fitting = [c for c in choices if value.keys() <= names[c]]
    if not fitting:
        raise InputError(
            f"{source}: got the fields {', '.join(value)}, expected {_type_name(hint)}"
        )
    chosen: Any = min(fitting, key=lambda c: len(names[c]))
    hints = get_type_hints(chosen)
    _check_complete(chosen, value, source)
    return chosen(
        **{name: _decode_value(hints[name], item, source) for name, item in value.items()}
    )


def to_mapping(config: Any) -> dict[str, Any]:
    """The JSON mapping of a dataclass; `from_mapping` reads it back as an equal config."""
    return dataclasses.asdict(config)


def non_default_fields(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults; later versions may have more."""
    values, defaults = dataclasses.asdict(config), _defaults(type(config))
    return {name: value for name, value in values.items() if value != defaults[name]}


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as a field of type `hint` holds it; InputError for a value of another type.

    Scalars of numpy and jax become Python's, lists and rows of numbers tuples, and paths text.
    """
    converted = _plain(value)
    if not _matches_type(converted, hint):
        raise InputError(f"{name}: got {value!r:.80}, expected {_type_name(hint)}")
    return converted


def _plain(value: Any) -> Any:
    if type(value) in (list, tuple, range) or getattr(value, "ndim", 0) == 1:  # no named tuples
        return tuple(_plain(item) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar else value


class Need(NamedTuple):
    """What an option needs to have an effect: that another one is set, or has one of `values`."""

    option: str
    values: tuple[Any, ...] = ()


def check_needs(options: Any, needs: Mapping[str, Need], *, prefix: str = "") -> None:
    """InputError for a field of the dataclass `options` that has no effect, for lack of another.

    `needs` has what such fields need. A field with its default asks for nothing. One that is None,
    0, empty or False is not set. `prefix` is that of the fields' names in errors.
    """
    defaults = _defaults(type(options))
    for name, need in needs.items():
        value, other = getattr(options, name), getattr(options, need.option)
        if value == defaults[name] or (other in need.values if need.values else other):
            continue
        wanted = f"{prefix}{need.option}"
        if not need.values:
            raise InputError(f"{prefix}{name}: got {value!s:.80} without {wanted}, expected both")
        choices = " or ".join(map(str, need.values))
        raise InputError(
            f"{prefix}{name}: got {value!s:.80} with {wanted} {other!s:.80}, "
            f"expected {wanted} {choices}"
        )


@functools.cache
def _defaults(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass's fields."""
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(cls)
    }


@contextlib.contextmanager
def prefix_errors(source: str) -> Iterator[None]:
    """Put `source` in front of an InputError that does not name it."""
    try:
        yield
    except InputError as error:
        raise error if source in str(error) else InputError(f"{source}: {error}") from None


def _matches_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the type `hint`: a scalar, a list of one type, or a choice."""
    if hint is Any:
        return True
    if get_origin(hint) in (Union, UnionType):
        return any(_matches_type(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if not isinstance(value, tuple):
            return False
        kinds = parts[:1] * len(value) if Ellipsis in parts else parts
        return len(kinds) == len(value) and all(map(_matches_type, value, kinds))
    if isinstance(value, bool):
        return hint is bool
    if dataclasses.is_dataclass(hint):  # another family's may stand where one's is
        return dataclasses.is_dataclass(value)
    return isinstance(value, (int, float) if hint is float else hint)


def _type_name(hint: Any) -> str:
    """A type as JSON calls its values."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type_name(c) for c in get_args(hint) if c is not type(None))
    if get_origin(hint) is tuple:
        return f"a list, each {_type_name(get_args(hint)[0])}"
    return _JSON.get(hint) or getattr(hint, "__name__", str(hint))
