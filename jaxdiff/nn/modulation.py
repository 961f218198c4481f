"""Layer norms whose shift, scale and gates a vector decides (adaLN, DiT, 2212.09748, section 3.2).

The linear layers that make them of the vector start at zero: nothing is shifted or scaled then, and
a block whose branches are multiplied by gates is the identity (adaLN-zero).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Float
from jaxdiff.nn import modulation_tpu
from jaxdiff.nn.attention import TPU_FROM
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.nn.norms import layer_norm
from jaxdiff.nn.platforms import platform_dependent

Tokens = Float[Array, "b n d"]
Vector = Float[Array, "b d"]
EPS = 1e-6  # of these norms in all published models


def modulated_norm(x: Tokens, shift: Vector, scale: Vector, *, eps: float = EPS) -> Tokens:
    """LayerNorm(x) (1 + scale) + shift, with one shift and one scale for all tokens of an image."""

    def plain(x: Array, shift: Array, scale: Array) -> Array:
        width = x.shape[-1]
        normed = layer_norm(x, jnp.ones(width, jnp.float32), jnp.zeros(width, jnp.float32), eps)
        return jnp.asarray(normed).astype(x.dtype) * (1 + scale[:, None]) + shift[:, None]

    if x.shape[1] < TPU_FROM:
        return plain(x, shift, scale)
    kernel = functools.partial(modulation_tpu.tpu, eps=eps)
    return platform_dependent(x, shift, scale, tpu=kernel, default=plain)


def gated(x: Tokens, gate: Vector) -> Tokens:
    """x times the gate of its image."""
    return x * gate[:, None]


class AdaLayerNormZero(nnx.Module):
    """A layer norm with a shift and a scale from a vector, which gives `chunks` vectors in all.

    `emb` is what makes that vector, where a checkpoint stores it with the norm.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: LayerFactory,
        chunks: int = 6,
        eps: float = EPS,
        emb: nnx.Module | None = None,
    ):
        self.emb = emb
        self.linear = layers.linear(width, chunks * width, init=ZEROS)
        self.chunks, self.eps = chunks, eps

    def __call__(self, x: Tokens, vector: Vector) -> tuple[Tokens, tuple[Vector, ...]]:
        """The normed tokens, shifted and scaled by the first two chunks, and the other chunks."""
        shift, scale, *others = jnp.split(self.linear(jax.nn.silu(vector)), self.chunks, axis=-1)
        return modulated_norm(x, shift, scale, eps=self.eps), tuple(others)


class AdaLayerNormContinuous(nnx.Module):
    """A layer norm with a scale and, after it, a shift from a vector of `cond_width`."""

    def __init__(self, width: int, cond_width: int, *, layers: LayerFactory, eps: float = EPS):
        self.linear = layers.linear(cond_width, 2 * width, init=ZEROS)
        self.eps = eps

    def __call__(self, x: Tokens, vector: Float[Array, "b e"]) -> Tokens:
        """The normed tokens, scaled and shifted."""
        scale, shift = jnp.split(self.linear(jax.nn.silu(vector)), 2, axis=-1)
        return modulated_norm(x, shift, scale, eps=self.eps)
