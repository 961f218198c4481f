"""Components of one prediction along another."""

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float


def project_onto(a: Float[Array, "b *d"], b: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """The component of a along b, image by image; zero where b is zero."""
    axes = tuple(range(1, a.ndim))
    square = jnp.sum(b * b, axes, keepdims=True)
    coefficient = jnp.sum(a * b, axes, keepdims=True) / jnp.where(square == 0, 1, square)
    return jnp.where(square == 0, 0, coefficient) * b
