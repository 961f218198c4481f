"""From shapes to a module with weights: large models are never built twice or on the host.

A module's weights are seen as a flat table of dotted paths ("down_blocks.0.resnets.0.norm1.scale").
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import flatten, unflatten

M = TypeVar("M", bound=nnx.Module)


def abstract(cls: Callable[..., M], *configs: Any, **options: Any) -> M:
    """A module `cls(*configs, **options)` whose weights are shapes and dtypes, at no memory."""
    return cls(*configs, **options, rngs=None)


def initial_weights(
    module: nnx.Module, seed: int, *, only: Callable[[str], bool] = lambda path: True
) -> Iterator[tuple[str, np.ndarray]]:
    """Paths and random initial values of the weights at paths for which `only` is true.

    They are drawn on the host one weight at a time. A weight's values depend on `seed` and its path
    only, so it does not matter what else a model has, nor which process draws. Compiling the same
    draws takes longer than this for any model that fits one host.
    """
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        name = ".".join(map(str, path))
        if only(name):
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            yield name, variable.init.numpy(rng, variable.shape).astype(variable.dtype)


def initialise(cls: Callable[..., M], *configs: Any, seed: int, **options: Any) -> M:
    """A module `cls(*configs, **options)` with random initial weights drawn from `seed`."""
    module = abstract(cls, *configs, **options)
    arrays = {path: jnp.asarray(array) for path, array in initial_weights(module, seed)}
    return with_params(module, arrays)


def param_dict(module: nnx.Module) -> dict[str, Any]:
    """The module's weights, arrays or shapes, by dotted path."""
    return flatten(nnx.to_pure_dict(nnx.state(module)))


def with_params(module: M, params: Mapping[str, Any]) -> M:
    """A copy of an abstract `module` with `params` (by dotted path) for weights.

    The arrays keep their own dtypes. InputError if a path is missing, unknown or of another shape.
    """
    expected = param_dict(module)
    _check_names("missing weights", set(expected) - set(params))
    _check_names("unknown weights", set(params) - set(expected))
    for path, array in params.items():
        if tuple(array.shape) != tuple(expected[path].shape):
            raise InputError(
                f"{path}: got shape {tuple(array.shape)}, expected {tuple(expected[path].shape)}"
            )
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, unflatten(params))
    return nnx.merge(graph, state)


def replace_weights(module: nnx.Module, params: Mapping[str, Any]) -> None:
    """Replace weights of `module` itself, by dotted path. InputError as `with_params`.

    Nothing is written into an array: whoever holds the old ones keeps their values.
    """
    table = param_dict(module)
    _check_names("unknown weights", set(params) - set(table))
    nnx.update(module, nnx.state(with_params(module, table | dict(params))))


def _check_names(what: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:4])
        raise InputError(f"{what}: got {len(names)} ({shown}), expected none")
