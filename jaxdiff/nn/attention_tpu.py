"""Flash attention as a TPU kernel in which tokens are columns.

The online softmax of Milakov & Gimelshein 2018 and the recomputation of Dao et al. 2022
(FlashAttention, algorithms 1 and 4). Tokens are columns (nn.tpu_kernels), and scores are (keys,
queries): what belongs to a query is a row, and no sum goes across lanes. One kernel computes all
gradients and holds those of a head's queries until its last block of keys; of many wide queries, as
in a VAE, those of one piece at a time.
"""

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff.core.types import Array, Float
from jaxdiff.nn.remat import save_for_backward
from jaxdiff.nn.tpu_kernels import (
    BY_HEAD,
    LANES,
    as_columns,
    as_tokens,
    divisor,
    on_each_device,
    whole_registers,
)

Q = Float[Array, "b n h d"]
KV = Float[Array, "b m h d"]
# As the kernels see them.
Queries = Float[Array, "h d bn"]
Keys = Float[Array, "h d bm"]
Rows = Float[Array, "h 1 bn"]

ONES = 16  # rows of ones below the values, as many as a register of two-byte numbers has
VMEM_BUDGET = 5 * 2**20  # bytes of VMEM for the gradients of queries: float32, and twice bfloat16
LOG2E = math.log2(math.e)
# Of a grid: a chip's cores may share images and heads; blocks need those before them.
SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Queries and keys of one grid step of a kernel, and how many keys it processes at once."""

    queries: int
    keys: int
    key_sub_block: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _KernelConfig:
    """What all kernels of one attention call share."""

    batch: int
    query_splits: int  # of an image's queries, for the gradients
    keys: int  # of an image that are not padding
    causal: bool
    scale: float  # of the scores
    forward: BlockSizes
    backward: BlockSizes
    interpret: bool


def tpu(q: Q, k: KV, v: KV, *, causal: bool, interpret: bool = False) -> Q:
    """Flash attention on a TPU, forwards and backwards, on the devices of `on_each_device`.

    `interpret` runs it on any platform, slowly, for tests.
    """
    kernel = functools.partial(_on_one_device, causal=causal, interpret=interpret)
    return on_each_device(kernel, (q, k, v), (BY_HEAD,) * 3)


def _on_one_device(q: Q, k: KV, v: KV, *, causal: bool, interpret: bool) -> Q:
    b, n, _, width = q.shape
    m = k.shape[1]
    rows, columns = whole_registers(n), whole_registers(m)
    splits = query_splits(rows, width)
    forward, _ = block_sizes(rows, columns, width)
    _, backward = block_sizes(rows // splits, columns, width)
    config = _KernelConfig(
        batch=b,
        query_splits=splits,
        keys=m,
        causal=causal,
        scale=width**-0.5,
        forward=forward,
        backward=backward,
        interpret=interpret,
    )
    out = cast(Array, _attend(as_columns(q), as_columns(k), as_columns(v), config))
    return as_tokens(out, b, n)


def query_splits(queries: int, width: int) -> int:
    """Into how many parts the queries are split so that their gradients fit VMEM_BUDGET."""
    registers = queries // LANES
    fitting = (i for i in range(1, registers) if queries * width * 8 <= i * VMEM_BUDGET)
    return next((i for i in fitting if registers % i == 0), registers)


def block_sizes(queries: int, keys: int, width: int) -> tuple[BlockSizes, BlockSizes]:
    """The blocks of the kernel forwards and of that backwards, for whole registers of tokens.

    With these the compiler schedules the fewest instructions for the heads of Stable Diffusion
    (benchmarks/tpu_blocks.py); of wider ones less has room in the chip's fast memory.
    """
    wide = math.ceil(width / LANES)

    def fitting(most_queries: int, most_keys: int, most_at_once: int) -> BlockSizes:
        block = divisor(keys, most_keys // wide)
        return BlockSizes(
            queries=divisor(queries, most_queries // wide),
            keys=block,
            key_sub_block=divisor(block, most_at_once // wide),
        )

    if keys == LANES:  # no second block of keys: the queries alone make a step long enough
        return fitting(2048, LANES, LANES), fitting(2048, LANES, LANES)
    return fitting(512, 5120, 512), fitting(1024, 2048, 256)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: Queries, k: Keys, v: Keys, config: _KernelConfig) -> Array:
    return _forward(q, k, v, config)[0]


def _attend_fwd(q: Queries, k: Keys, v: Keys, config: _KernelConfig):
    out, log_total = save_for_backward(_forward(q, k, v, config))
    return out, (q, k, v, out, log_total)


def _attend_bwd(config: _KernelConfig, residuals: tuple[Array, ...], d_out: Queries):
    q, k, v, out, log_total = residuals
    return _backward(q, k, v, out, log_total, d_out, config)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(q: Queries, k: Keys, v: Keys, config: _KernelConfig) -> tuple[Queries, Rows]:
    """The output, and the base-2 logarithm of each query's softmax denominator."""
    # Imported where it is used: it takes a good part of a second, which only a TPU should pay.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    size, (heads, width, tokens) = config.forward, q.shape
    rounds = tokens // (config.batch * size.queries)
    steps = k.shape[2] // (config.batch * size.keys)

    of_queries = pl.BlockSpec((1, width, size.queries), lambda b, h, i, j: (h, 0, b * rounds + i))
    of_keys = pl.BlockSpec((1, width, size.keys), lambda b, h, i, j: (h, 0, b * steps + j))
    row = pl.BlockSpec((1, 1, size.queries), lambda b, h, i, j: (h, 0, b * rounds + i))
    return pl.pallas_call(
        functools.partial(_forward_kernel, config=config, steps=steps),
        grid=(config.batch, heads, rounds, steps),
        in_specs=[of_queries, of_keys, of_keys],
        out_specs=[of_queries, row],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((heads, 1, tokens), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((1, size.queries), jnp.float32),
            pltpu.VMEM((1, size.queries), jnp.float32),
            pltpu.VMEM((width, size.queries), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        interpret=config.interpret,
        name=_kernel_name("forward", config, q, k),
    )(q, k, v)


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    log_ref,
    top_ref,
    total_ref,
    sum_ref,
    *,
    config: _KernelConfig,
    steps: int,
):
    """One block of queries against one of keys, the last of `steps` of which writes the output."""
    from jax.experimental import pallas as pl

    size = config.forward
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    q, top, total, out = q_ref[0], top_ref[...], total_ref[...], sum_ref[...]

    def scores(start: int) -> Float[Array, "k q"]:
        k = k_ref[0, :, start : start + size.key_sub_block]
        return _masked(_product(k, q, 0, 0), i, j, start, size, config)

    later = scores(0)
    for start in range(0, size.keys, size.key_sub_block):
        s, end = later, start + size.key_sub_block
        if end < size.keys:  # before the softmax of these, so that both can run at once
            later = scores(end)
        # Every query sees key 0, so new_top is finite from the first block on.
        new_top = jnp.maximum(top, s.max(0, keepdims=True))
        p = jnp.exp2((s - new_top) * (config.scale * LOG2E)).astype(v_ref.dtype)
        shrink = jnp.exp2((top - new_top) * (config.scale * LOG2E))
        # A row of ones below the values: the product sums the probabilities too.
        v = jnp.concatenate([v_ref[0, :, start:end], jnp.ones((ONES, len(s)), p.dtype)])
        sums = _product(v, p, 1, 0)
        out = out * shrink + sums[:-ONES]
        total = total * shrink + sums[-1:]
        top = new_top
    top_ref[...], total_ref[...], sum_ref[...] = top, total, out

    @pl.when(j == steps - 1)
    def _():
        out_ref[0] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)
        log_ref[0] = top_ref[...] * (config.scale * LOG2E) + jnp.log2(total_ref[...])


def _backward(
    q: Queries,
    k: Keys,
    v: Keys,
    out: Queries,
    log_total: Rows,
    d_out: Queries,
    config: _KernelConfig,
) -> tuple[Queries, Keys, Keys]:
    """The gradients of q, k and v."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    size, (heads, width, tokens) = config.backward, q.shape
    query_splits, cuts = config.query_splits, config.batch * config.query_splits
    queries, keys = tokens // cuts, k.shape[2] // config.batch
    rounds = keys // size.keys
    steps = queries // size.queries

    of_queries = pl.BlockSpec((1, width, size.queries), lambda b, h, j, i: (h, 0, b * steps + i))
    of_keys = pl.BlockSpec(
        (1, width, size.keys), lambda b, h, j, i: (h, 0, lax.div(b, query_splits) * rounds + j)
    )
    to_keys = pl.BlockSpec((1, width, size.keys), lambda b, h, j, i: (h, 0, b * rounds + j))
    row = pl.BlockSpec((1, 1, size.queries), lambda b, h, j, i: (h, 0, b * steps + i))
    whole = pl.BlockSpec((1, width, queries), lambda b, h, j, i: (h, 0, b))
    sums = (heads, width, cuts * keys)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, config=config, rounds=rounds, steps=steps),
        grid=(cuts, heads, rounds, steps),
        in_specs=[of_queries, of_keys, of_keys, of_queries, row, of_queries],
        out_specs=[whole, to_keys, to_keys],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(sums, k.dtype if query_splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct(sums, v.dtype if query_splits == 1 else jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((width, queries), jnp.float32),
            pltpu.VMEM((width, size.keys), jnp.float32),
            pltpu.VMEM((width, size.keys), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        interpret=config.interpret,
        name=_kernel_name("backward", config, q, k),
    )(q, k, v, out, log_total, d_out)
    if query_splits > 1:
        apart = (heads, width, config.batch, query_splits, keys)
        dk, dv = (x.reshape(apart).sum(3).reshape(k.shape).astype(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def _backward_kernel(
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    log_ref,
    d_out_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dq_sum,
    dk_sum,
    dv_sum,
    *,
    config: _KernelConfig,
    rounds: int,
    steps: int,
):
    """One block of keys against one of queries: `steps` of these for each of `rounds` of those."""
    from jax.experimental import pallas as pl

    size = config.backward
    j, i = pl.program_id(2), pl.program_id(3)
    among_all = lax.rem(pl.program_id(0), config.query_splits) * steps + i  # blocks of its image
    rows = pl.ds(i * size.queries, size.queries)

    @pl.when(i == 0)
    def _():
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    @pl.when(j == 0)
    def _():
        dq_sum[:, rows] = jnp.zeros(q_ref.shape[1:], jnp.float32)

    q, d_out, log_total = q_ref[0], d_out_ref[0], log_ref[0]
    # The softmax Jacobian's second term, one number for each query.
    drift = (d_out.astype(jnp.float32) * out_ref[0].astype(jnp.float32)).sum(0)[None]
    dq = jnp.zeros(q_ref.shape[1:], jnp.float32)

    def products(start: int) -> tuple[Float[Array, "k q"], Float[Array, "k q"]]:
        here = slice(start, start + size.key_sub_block)
        s = _masked(_product(k_ref[0, :, here], q, 0, 0), among_all, j, start, size, config)
        return s, _product(v_ref[0, :, here], d_out, 0, 0)

    later = products(0)
    for start in range(0, size.keys, size.key_sub_block):
        (s, dp), end = later, start + size.key_sub_block
        if end < size.keys:
            later = products(end)
        here = slice(start, end)
        p = jnp.exp2(s * (config.scale * LOG2E) - log_total)
        ds = (p * (dp - drift)).astype(q.dtype)
        dv_sum[:, here] += _product(d_out, p.astype(d_out.dtype), 1, 1)
        dk_sum[:, here] += _product(q, ds, 1, 1)
        dq += _product(k_ref[0, :, here], ds, 1, 0)
    dq_sum[:, rows] += dq

    @pl.when(i == steps - 1)
    def _():
        dk_ref[0] = (dk_sum[...] * config.scale).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when(j == rounds - 1)
    def _():
        dq_ref[0, :, rows] = (dq_sum[:, rows] * config.scale).astype(dq_ref.dtype)


def _kernel_name(direction: str, config: _KernelConfig, q: Queries, k: Keys) -> str:
    """A kernel's name, which tells those apart in a program whose results have one shape."""
    queries, keys = (x.shape[2] // config.batch for x in (q, k))
    return f"attention_{direction}_{queries}x{keys}"


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Float[Array, "r c"]:
    """The product of two matrices that sums over these axes of theirs, in float32."""
    sums = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, sums, preferred_element_type=jnp.float32)


def _masked(
    s: Float[Array, "k q"], i: Any, j: Any, start: int, size: BlockSizes, config: _KernelConfig
) -> Float[Array, "k q"]:
    """Scores of the query block i and of a part of the key block j, -inf where no key is seen."""
    padded = config.keys % LANES != 0
    if not padded and not config.causal:
        return s
    key = lax.broadcasted_iota(jnp.int32, s.shape, 0) + (j * size.keys + start)
    seen = key < config.keys
    if config.causal:
        query = lax.broadcasted_iota(jnp.int32, s.shape, 1) + i * size.queries
        seen = seen & (key <= query)
    return jnp.where(seen, s, -jnp.inf)
