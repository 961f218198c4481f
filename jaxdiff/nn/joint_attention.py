"""Attention with normed queries and keys, of one stream of tokens or of two jointly.

In joint attention (2403.03206, section 4) image and text tokens have projections of their own, and
each token attends to the tokens of both streams.
"""

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float
from jaxdiff.nn.attention import attention
from jaxdiff.nn.head_norm import HeadNorm
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.transformer import split_heads

EPS = 1e-6  # of the norms of queries and keys


class SelfAttention(nnx.Module):
    """Multi-head attention of tokens over themselves; `qk_norm` norms queries and keys by head."""

    def __init__(self, width: int, *, layers: LayerFactory, heads: int, qk_norm: bool):
        if heads < 1 or width % heads:
            raise InputError(f"attention heads: got {heads}, expected a divisor of width {width}")
        self.to_q = layers.linear(width, width)
        self.to_k = layers.linear(width, width)
        self.to_v = layers.linear(width, width)
        self.to_out = nnx.List([layers.linear(width, width)])
        self.norm_q, self.norm_k = (_norm(width // heads, qk_norm, layers) for _ in range(2))
        self.heads = heads
        self.backend = layers.attention

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Mix tokens; no residual is added."""
        return self.to_out[0](self._attend(*self._qkv(x)))

    def _qkv(self, x: Float[Array, "b n c"]) -> tuple[Float[Array, "b n h d"], ...]:
        """Queries, keys and values by head."""
        q, k, v = (split_heads(f(x), self.heads) for f in (self.to_q, self.to_k, self.to_v))
        return _normed(self.norm_q, q), _normed(self.norm_k, k), v

    def _attend(
        self, q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"]
    ) -> Float[Array, "b n c"]:
        return attention(q, k, v, backend=self.backend).reshape(*q.shape[:2], -1)


class JointAttention(SelfAttention):
    """Multi-head attention of two streams of tokens over both.

    Without `context_output` the second stream is only attended to.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: LayerFactory,
        heads: int,
        qk_norm: bool,
        context_output: bool = True,
    ):
        super().__init__(width, layers=layers, heads=heads, qk_norm=qk_norm)
        self.add_q_proj = layers.linear(width, width)
        self.add_k_proj = layers.linear(width, width)
        self.add_v_proj = layers.linear(width, width)
        self.to_add_out = layers.linear(width, width) if context_output else None
        self.norm_added_q, self.norm_added_k = (
            _norm(width // heads, qk_norm, layers) for _ in range(2)
        )

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "b n c"], context: Float[Array, "b m c"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b m c"] | None]:
        """Mix the tokens of both streams; no residuals are added."""
        pairs = zip(self._qkv(x), self._context_qkv(context), strict=True)
        out = self._attend(*(jnp.concatenate(pair, axis=1) for pair in pairs))
        own, added = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return self.to_out[0](own), None if self.to_add_out is None else self.to_add_out(added)

    def _context_qkv(self, context: Float[Array, "b m c"]) -> tuple[Float[Array, "b m h d"], ...]:
        projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (split_heads(f(context), self.heads) for f in projections)
        return _normed(self.norm_added_q, q), _normed(self.norm_added_k, k), v


def _norm(width: int, wanted: bool, layers: LayerFactory) -> HeadNorm | None:
    return HeadNorm(width, layers=layers, eps=EPS) if wanted else None


def _normed(norm: HeadNorm | None, x: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
    return x if norm is None else norm(x)
