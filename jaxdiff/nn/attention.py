"""Scaled dot-product attention: one function, several back ends that agree to rounding.

softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1), scores and softmax in float32.
Arrays are (batch, tokens, heads, head width); with `causal`, query i sees the keys j <= i.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import one_of

Q = Float[Array, "b n h d"]
KV = Float[Array, "b m h d"]


def plain(q: Q, k: KV, v: KV, *, causal: bool) -> Q:
    """Attention as the equation says, holding the full (b, h, n, m) score matrix."""
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5
    if causal:
        seen = jnp.tri(q.shape[1], k.shape[1], dtype=bool)
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhnm,bmhd->bnhd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


BACKENDS: dict[str, Callable[..., Array]] = {"plain": plain}


def choose(q: Q, k: KV) -> str:
    """The back end that "auto" means for these sizes on this platform."""
    return "plain"


def attention(q: Q, k: KV, v: KV, *, causal: bool = False, backend: str = "auto") -> Q:
    """Attention of queries over keys and values, in q's dtype.

    `backend` is "auto" or a name in BACKENDS; InputError for any other.
    """
    one_of("attention backend", backend, ["auto", *BACKENDS])
    name = choose(q, k) if backend == "auto" else backend
    return BACKENDS[name](q, k, v, causal=causal)
