"""Attention by kernels that others wrote for one kind of accelerator: cuDNN's and TPU's."""

import functools
import math
from collections.abc import Mapping, Sequence
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
# Of a mesh, by the convention of the package: what shares a batch, and what shares the heads.
BATCH_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"
# Lengths of blocks, tried in turn; with the first of those that fit the compiler schedules the
# fewest instructions. Of the forward kernel, and of the kernel that computes the gradients: it
# leaves one sum of q's gradients for each block of keys, and works on parts of such a block.
TPU_ROWS, TPU_COLUMNS, TPU_PARTS = (
    (512, 256, 128),
    (2048, 1024, 512, 256, 128),
    (1024, 512, 256, 128),
)
TPU_WIDE = 256  # from this head width blocks of 2048 have no room


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
    a mesh, and runs on each device's part of the batch (axes "data" and "fsdp") and of the heads
    ("tensor"), or from within `jax.shard_map` or `jax.pmap`. `interpret` runs it on any platform,
    slowly, for tests.
    """
    kernel = functools.partial(_splash, causal=causal, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names or set(mesh.manual_axes) == set(mesh.axis_names):
        return kernel(q, k, v)
    spec = _shares(q, mesh.shape)
    # Of the kernel's results nothing is known to the check of varying axes.
    divided = jax.shard_map(kernel, in_specs=spec, out_specs=spec, check_vma=False)
    return cast(Array, divided(q, k, v))


def _shares(q: Q, sizes: Mapping[str, int]) -> PartitionSpec:
    """How q, k and v are split over a mesh of these sizes; whole along axes that do not divide."""
    batch = tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)
    heads = HEAD_AXIS if sizes.get(HEAD_AXIS, 1) > 1 else None
    if len(q) % math.prod(sizes[axis] for axis in batch):
        batch = ()
    if heads and q.shape[2] % sizes[heads]:
        heads = None
    return PartitionSpec(batch or None, None, heads)


def _splash(q: Q, k: KV, v: KV, *, causal: bool, interpret: bool) -> Q:
    # Imported here because it takes a good part of a second, which only a TPU should pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    n, m, heads, width = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    q = q * jnp.asarray(width**-0.5, q.dtype)
    # The kernel takes (heads, tokens, width) and whole blocks of tokens.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q, k, v = (_pad(x, 2, TPU_ROWS[-1]) for x in (q, k, v))
    kind = masks.CausalMask if causal else masks.FullMask
    tokens_last = splash.QKVLayout.SEQ_MINOR
    rows, columns = q.shape[2], k.shape[2]
    sizes = TPU_COLUMNS if width < TPU_WIDE else TPU_ROWS
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([kind((rows, columns))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=_block(rows, TPU_ROWS),
            block_kv=_block(columns, sizes),
            block_q_dkv=_block(rows, TPU_ROWS),
            block_kv_dkv=_block(columns, sizes),
            block_kv_dkv_compute=min(_block(columns, sizes), _block(columns, TPU_PARTS)),
            # All gradients in one kernel: the scores are computed once less.
            use_fused_bwd_kernel=True,
            # Tokens fill the registers' 128 lanes; a head's width would be padded to them.
            q_layout=tokens_last,
            k_layout=tokens_last,
            v_layout=tokens_last,
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


def _block(length: int, sizes: Sequence[int]) -> int:
    """The first of the block sizes that divides the length, which the last of them does."""
    return next(size for size in sizes if length % size == 0)
