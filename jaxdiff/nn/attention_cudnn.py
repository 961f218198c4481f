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
MULTIPLE = 8  # of a head's width


def cudnn(q: Q, k: KV, v: KV, *, causal: bool) -> Q:
    """cuDNN's flash attention on an NVIDIA GPU (Ampere or later), forwards and backwards.

    InputError for float32, which it does not know, and for heads wider than 128.
    """
    one_of("dtype for cudnn attention", q.dtype.name, CUDNN_DTYPES)
    width = q.shape[-1]
    if width > CUDNN_WIDTH:
        raise InputError(
            f"head width for cudnn attention: got {width}, expected at most {CUDNN_WIDTH}"
        )
    # Zeros add nothing to any score.
    pad = ((0, 0), (0, 0), (0, 0), (0, -width % MULTIPLE))
    q, k, v = (jnp.pad(x, pad) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=width**-0.5, is_causal=causal, implementation="cudnn"
    )
    return out[..., :width]
