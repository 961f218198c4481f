"""Embeddings of the diffusion time and of other scalars."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Float, Int
from jaxdiff.nn.activations import activation
from jaxdiff.nn.initializers import ZEROS
from jaxdiff.nn.layers import LayerFactory


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
    # Of large t the last digit of a frequency counts: exponents as PyTorch rounds them, and exp
    # to its last digit, which compilers do not promise.
    exponents = -np.float32(math.log(10000.0)) * np.arange(half, dtype=np.float32)
    exponents = (exponents / np.float32(half - freq_shift)).astype(np.float64)
    frequencies = jnp.asarray(np.exp(exponents), jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = [jnp.cos(angles), jnp.sin(angles)] if cos_first else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


def guidance_embedding(w: Float[Array, "b"], width: int) -> Float[Array, "b {width}"]:
    """The embedding of the scale w for a guidance-distilled network (2210.03142, section 3.1).

    Sines and cosines of 1000 (w - 1), as latent consistency models have it (2310.04378).
    """
    return sinusoidal(1000 * (w - 1), width, cos_first=False, freq_shift=1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers that turn a sinusoidal (or other) vector into the blocks' embedding.

    A condition of `cond_width` is projected and added to the vector; the projection starts at zero.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        layers: LayerFactory,
        act: str = "silu",
        cond_width: int | None = None,
    ):
        self.linear_1 = layers.linear(n_in, n_out)
        self.cond_proj = (
            None if cond_width is None else layers.linear(cond_width, n_in, bias=False, init=ZEROS)
        )
        self.linear_2 = layers.linear(n_out, n_out)
        self.act = act

    def __call__(
        self, x: Float[Array, "b i"], condition: Float[Array, "b s"] | None = None
    ) -> Float[Array, "b o"]:
        """The embedding, in the compute dtype."""
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition).astype(x.dtype)
        return self.linear_2(activation(self.act)(self.linear_1(x)))


class LabelEmbedding(nnx.Module):
    """A vector for each class, and one for no class after them."""

    def __init__(self, num_classes: int, width: int, *, layers: LayerFactory):
        self.embedding_table = layers.embed(num_classes + 1, width)

    def __call__(self, labels: Int[Array, "b"]) -> Float[Array, "b d"]:
        """The vectors of the labels."""
        return self.embedding_table(labels)
