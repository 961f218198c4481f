"""From shapes to a module with weights: large models are never built twice or on the host.

A module's weights are seen as a flat table of dotted paths ("down_blocks.0.resnets.0.norm1.scale").
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import flatten, unflatten
from jaxdiff.core.types import Array, Key

M = TypeVar("M", bound=nnx.Module)


class _OneKey(nnx.Rngs):
    """The same key for every weight, where no value is ever drawn.

    Counting draws on a traced counter takes most of the time of tracing a large model.
    """

    def params(self) -> Key[Array, ""]:
        """A key."""
        return jax.random.key(0)


def abstract(cls: Callable[..., M], *configs: Any, **options: Any) -> M:
    """A module `cls(*configs, **options)` whose weights are shapes and dtypes, at no memory."""
    return nnx.eval_shape(lambda: cls(*configs, **options, rngs=_OneKey(0)))


def initialise(cls: Callable[..., M], *configs: Any, key: Key[Array, ""], **options: Any) -> M:
    """A module `cls(*configs, **options)` with random initial weights drawn from `key`.

    Compiled as one program, which is several times faster than drawing weight by weight.
    """
    shapes = nnx.split(abstract(cls, *configs, **options))

    @jax.jit
    def draw(key: Key[Array, ""]) -> Any:
        return nnx.state(cls(*configs, **options, rngs=nnx.Rngs(key)))

    return nnx.merge(shapes[0], draw(key))


def weights(module: nnx.Module) -> dict[str, Any]:
    """The module's weights, arrays or shapes, by dotted path."""
    return flatten(nnx.to_pure_dict(nnx.state(module)))


def assemble(module: M, arrays: Mapping[str, Any]) -> M:
    """A copy of an abstract `module` with `arrays` (by dotted path) for weights.

    The arrays keep their own dtypes. InputError if a path is missing, unknown or of another shape.
    """
    expected = weights(module)
    _check_names("missing weights", set(expected) - set(arrays))
    _check_names("unknown weights", set(arrays) - set(expected))
    for path, array in arrays.items():
        if tuple(array.shape) != tuple(expected[path].shape):
            raise InputError(
                f"{path}: got shape {tuple(array.shape)}, expected {tuple(expected[path].shape)}"
            )
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, unflatten(arrays))
    return nnx.merge(graph, state)


def _check_names(what: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:4])
        raise InputError(f"{what}: got {len(names)} ({shown}), expected none")
