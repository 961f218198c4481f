"""Random numbers with a key per sample, so that they do not depend on how a batch is split.

A key argument is either one key, from which sample i gets fold_in(key, i), or one key per sample.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Dtype, Key


def sample_keys(key: Key[Array, "..."], n: int) -> Key[Array, "n"]:
    """The keys of n samples."""
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def per_sample_split(key: Key[Array, "..."], n: int, count: int) -> tuple[Key[Array, "n"], ...]:
    """`count` independent keys for each of n samples: one array of n keys for each purpose."""
    keys = jax.vmap(lambda k: jax.random.split(k, count))(sample_keys(key, n))
    return tuple(keys[:, i] for i in range(count))


def per_sample_normal(
    key: Key[Array, "..."], shape: tuple[int, ...], dtype: Dtype = jnp.float32
) -> Array:
    """Standard normal samples of `shape`, whose first axis is the batch."""
    return _vmap(key, shape, lambda k: jax.random.normal(k, shape[1:], dtype))


def per_sample_uniform(
    key: Key[Array, "..."], shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
) -> Array:
    """Uniform samples in [low, high) of `shape`, whose first axis is the batch."""
    return _vmap(key, shape, lambda k: jax.random.uniform(k, shape[1:], minval=low, maxval=high))


def _vmap(
    key: Key[Array, "..."], shape: tuple[int, ...], sample: Callable[[Key[Array, ""]], Array]
) -> Array:
    return jax.vmap(sample)(sample_keys(key, shape[0]))
