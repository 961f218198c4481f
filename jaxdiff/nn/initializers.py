"""Initializers of weights, as data.

An initializer travels with its `nnx.Param`, so that a module built from shapes alone still knows
how to initialize each of its weights.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Dtype, Key


@dataclasses.dataclass(frozen=True)
class Constant:
    """Every entry is `value`."""

    value: float

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Dtype) -> Array:
        """The values as a JAX array; the key is not needed."""
        return jnp.full(shape, self.value, dtype)

    def numpy(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The values as a numpy array; the generator is not needed."""
        return np.full(shape, self.value, np.float32)


@dataclasses.dataclass(frozen=True)
class Normal:
    """Independent Gaussian entries of standard deviation `std` and mean zero."""

    std: float

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Dtype) -> Array:
        """The values as a JAX array."""
        return jax.random.normal(key, shape, dtype) * jnp.asarray(self.std, dtype)

    def numpy(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The values as a numpy array."""
        return rng.standard_normal(shape, np.float32) * np.float32(self.std)


@runtime_checkable
class Initializer(Protocol):
    """The initial values of a weight, made on a device or on the host."""

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Dtype) -> Array:
        """The values as a JAX array."""
        ...

    def numpy(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The values as a numpy array."""
        ...


@dataclasses.dataclass(frozen=True)
class SincosGrid:
    """Positions (1, n n, d) of a grid of n x n patches as sines and cosines.

    The first half of the d entries is of the column and the second of the row, each half d/4 sines
    and then d/4 cosines at frequencies 10000^(-4i/d) (2212.09748, after Vaswani et al. 2017). The
    rows and columns i of the grid stand at i `base` / n.
    """

    base: float

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Dtype) -> Array:
        """The values as a JAX array; the key is not needed."""
        return jnp.asarray(self.values(shape), dtype)

    def numpy(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """The values as a numpy array; the generator is not needed."""
        return self.values(shape)

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        """The values for (1, n n, d)."""
        side, quarter = math.isqrt(shape[1]), shape[2] // 4
        frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
        angles = np.outer(np.arange(side) * self.base / side, frequencies)
        line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        columns, rows = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)
        return np.concatenate([columns, rows], axis=1)[None].astype(np.float32)


ZEROS = Constant(0.0)
ONES = Constant(1.0)


def lecun_normal(shape: tuple[int, ...]) -> Normal:
    """Variance 1 / fan-in for a kernel of `shape`, its last axis the outputs (LeCun 1998)."""
    return Normal(math.prod(shape[:-1]) ** -0.5)
