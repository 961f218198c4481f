"""Attention in which some keys are hidden: padding of texts, in the same attention as an image."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff.core.types import Array, Bool, Float

MAX_ROWS = 512  # queries whose scores are held at once


def masked_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "b m"],
) -> Float[Array, "b n h d"]:
    """softmax(q k^T / sqrt(d)) v over the keys where `mask` is true, one at least, in q's dtype.

    Scores and softmax are in float32. Queries are taken MAX_ROWS at a time, and their scores are
    computed again for the gradient, so that no (n, m) matrix is held.
    """
    b, n, h, d = q.shape
    rows = min(n, MAX_ROWS)
    blocks = jnp.pad(q, ((0, 0), (0, -n % rows), (0, 0), (0, 0))).reshape(b, -1, rows, h, d)
    keys, values, seen = k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, None, None]

    @jax.checkpoint
    def attend(block: Float[Array, "b r h d"]) -> Float[Array, "b r h d"]:
        scores = jnp.einsum("brhd,bhmd->bhrm", block, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(seen, scores * d**-0.5, -jnp.inf), axis=-1)
        out = jnp.einsum(
            "bhrm,bhmd->brhd",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return out.astype(q.dtype)

    out = lax.map(attend, blocks.swapaxes(0, 1)).swapaxes(0, 1)
    return out.reshape(b, -1, h, d)[:, :n]
