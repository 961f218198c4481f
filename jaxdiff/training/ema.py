"""Exponential moving average of the parameters, in float32, with warm-up."""

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Int, PyTree


def decay_at(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """min(b, (1 + n) / (10 + n)) after `step` = n finished updates: short memory while young."""
    n = step.astype(jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))


def update(ema: PyTree, params: PyTree, decay: Float[Array, ""]) -> PyTree:
    """b ema + (1 - b) params, written so that equal trees are an exact fixed point."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), ema, params)
