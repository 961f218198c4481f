"""Attention by kernels that others wrote for one kind of accelerator: cuDNN's and TPU's."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import one_of

Q = Float[Array, "b n h d"]
KV = Float[Array, "b m h d"]

CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_WIDTH = 128  # widest head of the flash kernels on every GPU that has them
BATCH_AXIS = "data"  # of a mesh, by the convention of the whole package
TPU_BLOCKS = (512, 256, 128)  # tried in turn: large blocks keep the matrix unit busy


def _pad(x: Array, axis: int, multiple: int) -> Array:
    """`x` with zeros after its end along `axis`, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


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
    q, k, v = (_pad(x, 3, 8) for x in (q, k, v))  # zeros add nothing to any score
    out = jax.nn.dot_product_attention(
        q, k, v, scale=width**-0.5, is_causal=causal, implementation="cudnn"
    )
    return out[..., :width]


def tpu(q: Q, k: KV, v: KV, *, causal: bool, interpret: bool = False) -> Q:
    """The splash attention kernel that comes with JAX, on TPU, forwards and backwards.

    The compiler cannot divide it among devices. In a program for several, it must be called under
    `jax.set_mesh`, and runs on each device's part of the batch (mesh axis "data"), or from within
    `jax.shard_map` or `jax.pmap`. `interpret` runs it on any platform, slowly, for tests.
    """
    kernel = functools.partial(_splash, causal=causal, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names or set(mesh.manual_axes) == set(mesh.axis_names):
        return kernel(q, k, v)
    shards = mesh.shape.get(BATCH_AXIS, 1)
    spec = PartitionSpec(BATCH_AXIS if shards > 1 and len(q) % shards == 0 else None)
    # Of the kernel's results nothing is known to the check of varying axes.
    divided = jax.shard_map(kernel, in_specs=spec, out_specs=spec, check_vma=False)
    return cast(Array, divided(q, k, v))


def _splash(q: Q, k: KV, v: KV, *, causal: bool, interpret: bool) -> Q:
    # Imported here because it takes a good part of a second, which only a TPU should pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    n, m, heads, width = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    block_q, block_k = _block(n), _block(m)
    q = q * jnp.asarray(width**-0.5, q.dtype)
    # The kernel takes (heads, tokens, width) and whole blocks of tokens.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q, k, v = _pad(q, 2, block_q), _pad(k, 2, block_k), _pad(v, 2, block_k)
    kind = masks.CausalMask if causal else masks.FullMask
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([kind((q.shape[2], k.shape[2]))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # Tokens see their own segment only: the padding keys are of another.
    padding = (jnp.arange(k.shape[2]) >= m).astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.zeros(q.shape[2], jnp.int32), kv=padding)
    segments = segments if padding.size > m else None
    out = cast(Array, jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments))
    return out.swapaxes(1, 2)[:, :n]


def _block(length: int) -> int:
    """The largest block size that needs no more padding than the smallest."""
    return next(b for b in TPU_BLOCKS if -length % b == -length % TPU_BLOCKS[-1])
