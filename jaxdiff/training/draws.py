"""Random draws of a batch, each from a key of its own sample, so that they are the same however
the batch is cut.

Wherever a key is asked for it may be one key, of which sample i gets fold_in(key, i), or the keys
of the samples themselves.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Dtype, Key

Draw = Callable[[Key[Array, ""]], Array]


def sample_keys(key: Key[Array, "..."], n: int) -> Key[Array, "n"]:
    """The keys of n samples."""
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def split(key: Key[Array, "..."], n: int, count: int) -> tuple[Key[Array, "n"], ...]:
    """`count` independent keys for each of n samples: one array of n keys for each purpose."""
    keys = jax.vmap(lambda k: jax.random.split(k, count))(sample_keys(key, n))
    return tuple(keys[:, i] for i in range(count))


def normal(key: Key[Array, "..."], shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Standard normal draws of `shape`, whose first axis counts samples."""
    return _each(key, shape, lambda k: jax.random.normal(k, shape[1:], dtype))


def uniform(
    key: Key[Array, "..."], shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
) -> Array:
    """Uniform draws from [low, high) of `shape`, whose first axis counts samples."""
    return _each(key, shape, lambda k: jax.random.uniform(k, shape[1:], minval=low, maxval=high))


def _each(key: Key[Array, "..."], shape: tuple[int, ...], draw: Draw) -> Array:
    return jax.vmap(draw)(sample_keys(key, shape[0]))
