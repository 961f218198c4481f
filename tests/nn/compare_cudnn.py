"""cuDNN attention against the plain one on the GPU, forwards and backwards: N M WIDTH CAUSAL."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.nn.attention import attention

n, m, d, causal = map(int, sys.argv[1:])
keys = jax.random.split(jax.random.key(0), 4)
q, k, v = (
    jax.random.normal(key, (2, x, 3, d), jnp.bfloat16)
    for key, x in zip(keys, (n, m, m), strict=False)
)
direction = jax.random.normal(keys[3], q.shape)


def both(backend, dtype):
    """The output and the gradients of one of its projections."""

    def loss(q, k, v):
        out = attention(q, k, v, causal=bool(causal), backend=backend).astype(jnp.float32)
        return (out * direction).sum(), out

    inputs = (x.astype(dtype) for x in (q, k, v))
    return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs))


with jax.default_matmul_precision("highest"):
    exact = both("plain", jnp.float32)
for got, wanted in zip(both("cudnn", jnp.bfloat16), exact, strict=True):
    error = np.abs(np.asarray(got, np.float32) - wanted).max() / np.abs(wanted).max()
    assert error < 4 * float(jnp.finfo(jnp.bfloat16).eps), error
