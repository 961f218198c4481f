"""Attention in blocks of queries and keys: memory linear in the lengths, on any platform.

The online softmax of Milakov & Gimelshein 2018 over blocks of keys, and for the gradient the
recomputation of Dao et al. 2022 (FlashAttention, algorithms 1 and 4), both as `lax` loops.
Inside, arrays are (blocks, batch, heads, block length, head width).
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff.core.types import Array, Float, Int
from jaxdiff.nn.remat import save_for_backward

Q = Float[Array, "b n h d"]
KV = Float[Array, "b m h d"]
QBlocks = Float[Array, "blocks_q b h q d"]
KBlocks = Float[Array, "blocks_k b h k d"]
Rows = Float[Array, "blocks_q b h q"]

# Measured with benchmarks/attention.py: a block of scores for a few heads fits the cache.
BLOCK_Q = 256
BLOCK_K = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mask:
    """Which keys a query sees: none of the padding and, if causal, none after itself."""

    causal: bool
    keys: int  # the number of keys that are not padding

    def apply(
        self, scores: Float[Array, "b h q k"], i: Int[Array, ""], j: Int[Array, ""]
    ) -> Float[Array, "b h q k"]:
        """Scores of query block i and key block j, -inf where the key is not seen."""
        rows = i * scores.shape[2] + jnp.arange(scores.shape[2])[:, None]
        columns = j * scores.shape[3] + jnp.arange(scores.shape[3])[None, :]
        seen = columns < self.keys
        if self.causal:
            seen = seen & (columns <= rows)
        return jnp.where(seen[None, None], scores, -jnp.inf)


def blockwise(
    q: Q, k: KV, v: KV, *, causal: bool, block_q: int = BLOCK_Q, block_k: int = BLOCK_K
) -> Q:
    """Attention without ever holding the full score matrix, nor in the backward pass."""
    n, m = q.shape[1], k.shape[1]
    block_q, block_k = min(block_q, n), min(block_k, m)
    mask = _Mask(causal=causal, keys=m)
    out = cast(Array, _attend(_split(q, block_q), _split(k, block_k), _split(v, block_k), mask))
    whole = out.transpose(1, 0, 3, 2, 4).reshape(q.shape[0], -1, *q.shape[2:])
    return whole[:, :n]


def _split(x: Float[Array, "b n h d"], length: int) -> Float[Array, "blocks b h {length} d"]:
    """`x` cut along its tokens, zeros filling up the last block."""
    b, n, h, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -n % length), (0, 0), (0, 0)))
    return x.reshape(b, -1, length, h, d).transpose(1, 0, 3, 2, 4)


def _product(pattern: str, a: Array, b: Array) -> Array:
    """A batched matrix product, accumulated in float32."""
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, i: Array, j: Array, mask: _Mask) -> Array:
    return mask.apply(_product("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5, i, j)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: QBlocks, k: KBlocks, v: KBlocks, mask: _Mask) -> Array:
    return _forward(q, k, v, mask)[0]


def _forward(q: QBlocks, k: KBlocks, v: KBlocks, mask: _Mask) -> tuple[QBlocks, Rows]:
    """The output and the logarithm of each query's softmax denominator."""
    key_blocks = (jnp.arange(len(k)), k, v)

    def query_block(block: tuple[Array, Array]) -> tuple[Array, Array]:
        i, q_i = block

        def step(carry, key_block):
            top, total, out = carry
            j, k_j, v_j = key_block
            s = _scores(q_i, k_j, i, j, mask)
            new_top = jnp.maximum(top, s.max(-1))
            # Every query sees key 0, so new_top is finite from the first block on.
            p = jnp.exp(s - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            out = out * shrink[..., None] + _product("bhqk,bhkd->bhqd", p.astype(v_j.dtype), v_j)
            return (new_top, total * shrink + p.sum(-1), out), None

        rows = q_i.shape[:3]
        start = (
            jnp.full(rows, -jnp.inf, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(q_i.shape, jnp.float32),
        )
        (top, total, out), _ = lax.scan(step, start, key_blocks)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    return lax.map(query_block, (jnp.arange(len(q)), q))


def _attend_fwd(q: QBlocks, k: KBlocks, v: KBlocks, mask: _Mask):
    out, log_total = save_for_backward(_forward(q, k, v, mask))
    return out, (q, k, v, out, log_total)


def _attend_bwd(mask: _Mask, residuals: tuple[Array, ...], d_out: QBlocks):
    q, k, v, out, log_total = residuals
    # The softmax Jacobian's second term, one number for each query.
    drift = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    scale = q.shape[-1] ** -0.5
    query_blocks = (jnp.arange(len(q)), q, d_out, log_total, drift)

    def key_block(dq, block):
        j, k_j, v_j = block

        def step(carry, query_block):
            dk, dv = carry
            i, q_i, d_i, log_total_i, drift_i = query_block
            p = jnp.exp(_scores(q_i, k_j, i, j, mask) - log_total_i[..., None])
            dv = dv + _product("bhqk,bhqd->bhkd", p.astype(d_i.dtype), d_i)
            dp = _product("bhqd,bhkd->bhqk", d_i, v_j)
            ds = (p * (dp - drift_i[..., None]) * scale).astype(q_i.dtype)
            dk = dk + _product("bhqk,bhqd->bhkd", ds, q_i)
            return (dk, dv), _product("bhqk,bhkd->bhqd", ds, k_j)

        zero = jnp.zeros(k_j.shape, jnp.float32)
        (dk, dv), dq_j = lax.scan(step, (zero, zero), query_blocks)
        return dq + dq_j, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), (jnp.arange(len(k)), k, v))
    return dq.astype(q.dtype), dk, dv


_attend.defvjp(_attend_fwd, _attend_bwd)
