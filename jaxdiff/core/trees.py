"""Nested dicts of arrays seen as flat tables with dotted names."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Dtype, PyTree


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """`{"a": {"b": x}}` as `{"a.b": x}`; integer keys (list positions) become digits."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{suffix}": leaf for suffix, leaf in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of `flatten`: dotted names to nested dicts, digits to integer keys."""
    tree: dict[Any, Any] = {}
    for name, leaf in flat.items():
        *parents, last = [int(part) if part.isdigit() else part for part in name.split(".")]
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def cast_floating(tree: PyTree, dtype: Dtype) -> PyTree:
    """`tree` with its floating leaves in `dtype`; integers and keys stay as they are."""

    def leaf(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def content_digest(arrays: Mapping[str, Any]) -> str:
    """A hash, 64 hex digits, of arrays by name: of every byte, shape and dtype."""

    def one(item: tuple[str, Any]) -> str:
        name, array = item
        host = np.ascontiguousarray(array)
        data = hashlib.sha256(f"{name} {host.dtype} {host.shape}".encode())
        data.update(host.reshape(-1).view(np.uint8).data)
        return data.hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        digests = pool.map(one, sorted(arrays.items()))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def parameter_count(tree: PyTree) -> int:
    """The number of parameters in `tree`; leaves need only a shape."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
