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


ZEROS = Constant(0.0)
ONES = Constant(1.0)


def lecun_normal(shape: tuple[int, ...]) -> Normal:
    """Variance 1 / fan-in for a kernel of `shape`, its last axis the outputs (LeCun 1998)."""
    return Normal(math.prod(shape[:-1]) ** -0.5)
