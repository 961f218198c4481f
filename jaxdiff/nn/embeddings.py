"""Embeddings of the diffusion time and of other scalars."""

import math

import jax.numpy as jnp
from flax import nnx

from jaxdiff.core.types import Array, Float, Int
from jaxdiff.nn.activations import activation
from jaxdiff.nn.layers import Layers


def sinusoidal(
    t: Float[Array, "b"] | Int[Array, "b"],
    width: int,
    *,
    cos_first: bool = True,
    freq_shift: float = 0.0,
) -> Float[Array, "b {width}"]:
    """Sines and cosines of t at frequencies 10000^(-i / (width/2 - freq_shift)), in float32.

    Ho et al. 2020, after Vaswani et al. 2017; t in steps of the training schedule, fractions
    allowed. An odd width ends in a zero.
    """
    half = width // 2
    exponents = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(exponents)[None, :]
    parts = [jnp.cos(angles), jnp.sin(angles)] if cos_first else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


class TimestepEmbedding(nnx.Module):
    """Two linear layers that turn a sinusoidal (or other) vector into the blocks' embedding."""

    def __init__(self, n_in: int, n_out: int, *, layers: Layers, act: str = "silu"):
        self.linear_1 = layers.linear(n_in, n_out)
        self.linear_2 = layers.linear(n_out, n_out)
        self.act = act

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        """The embedding, in the compute dtype."""
        return self.linear_2(activation(self.act)(self.linear_1(x)))
