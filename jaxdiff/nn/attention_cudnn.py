"""Attention by cuDNN's flash kernels, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import one_of

Q = Float[Array, "b n h d"]
KV = Float[Array, "b m h d"]

CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_WIDTH = 128  # widest head of the flash kernels on every GPU that has them
MULTIPLE = 8  # of a head's width and of tokens: with gradients jax refuses odd numbers of them


def cudnn(q: Q, k: KV, v: KV, *, causal: bool) -> Q:
    """cuDNN's flash attention on an NVIDIA GPU (Ampere or later), forwards and backwards.

    InputError for float32, which it does not know, and for heads wider than 128.
    """
    one_of("dtype for cudnn attention", q.dtype.name, CUDNN_DTYPES)
    b, n, _, width = q.shape
    m = k.shape[1]
    if width > CUDNN_WIDTH:
        raise InputError(
            f"head width for cudnn attention: got {width}, expected at most {CUDNN_WIDTH}"
        )

    def padded(x: Array) -> Array:
        # Zeros in a head's width add nothing to any score; tokens beyond the lengths are not seen.
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % MULTIPLE), (0, 0), (0, -width % MULTIPLE)))

    def length(tokens: int) -> Array | None:
        uneven = n % MULTIPLE or m % MULTIPLE
        return jnp.full(b, tokens, jnp.int32) if uneven else None

    out = jax.nn.dot_product_attention(
        padded(q),
        padded(k),
        padded(v),
        scale=width**-0.5,
        is_causal=causal,
        query_seq_lengths=length(n),
        key_value_seq_lengths=length(m),
        implementation="cudnn",
    )
    return out[:, :n, :, :width]
