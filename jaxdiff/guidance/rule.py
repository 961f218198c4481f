"""What makes a class a guidance rule."""

import dataclasses
from typing import TypeVar, dataclass_transform, get_type_hints

from jaxdiff.core.pytree_dataclass import register_pytree
from jaxdiff.guidance.base import Guidance, Number

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def rule(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a pytree of its numbers and of the rule that it wraps."""
    registered = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    names = [f.name for f in dataclasses.fields(registered)]  # pyright: ignore[reportArgumentType]
    hints = get_type_hints(registered, include_extras=True)  # also of annotations that are strings
    data_fields = [name for name in names if hints[name] in (Number, Guidance)]
    register_pytree(registered, data_fields, [name for name in names if name not in data_fields])
    return registered
