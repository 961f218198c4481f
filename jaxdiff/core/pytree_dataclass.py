"""Frozen dataclasses whose fields are traced, in part."""

from collections.abc import Sequence
from typing import Any

import jax


def register_pytree(cls: type[Any], data_fields: Sequence[str], meta_fields: Sequence[str]) -> None:
    """Make a frozen dataclass a pytree of `data_fields`; `meta_fields` are static.

    Traced values do not go through __init__, whose checks need numbers.
    """

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        data, meta = ([getattr(value, n) for n in names] for names in (data_fields, meta_fields))
        return data, tuple(meta)

    def unflatten(meta: tuple[Any, ...], leaves: Sequence[Any]) -> Any:
        value = object.__new__(cls)
        for name, content in zip([*data_fields, *meta_fields], [*leaves, *meta], strict=True):
            object.__setattr__(value, name, content)
        return value

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
