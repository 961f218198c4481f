"""Every attention back end against the equation, forwards and backwards."""

import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.core.errors import InputError
from jaxdiff.nn import attention as attention_module
from jaxdiff.nn import attention_tpu
from jaxdiff.nn.attention import attention, reference_attention, select_backend
from jaxdiff.nn.attention_blockwise import blockwise
from jaxdiff.nn.attention_cudnn import cudnn
from jaxdiff.nn.attention_tpu import LANES, block_sizes, query_splits, tpu


def by_hand(q, k, v, causal):
    """The equation in float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        seen = min(i + 1, k.shape[1]) if causal else k.shape[1]
        scores = k[b, :seen, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
        p = np.exp(scores - scores.max())
        out[b, i, h] = p @ v[b, :seen, h] / p.sum()
    return out


def arrays(n, m, d=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((2, n, 3, d), (2, m, 3, d), (2, m, 3, d))
    return [jnp.asarray(2 * rng.standard_normal(s, np.float32), dtype) for s in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 9), (9, 5), (1, 4)])
def test_plain(n, m, causal):
    q, k, v = arrays(n, m)
    got = jax.jit(reference_attention, static_argnames="causal")(q, k, v, causal=causal)
    np.testing.assert_allclose(got, by_hand(q, k, v, causal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(16, 16), (10, 23), (23, 10), (3, 40), (1, 1)])
def test_blockwise(n, m, causal):
    q, k, v = arrays(n, m)
    call = jax.jit(functools.partial(blockwise, causal=causal, block_q=4, block_k=8))
    got = call(q, k, v)
    np.testing.assert_allclose(got, by_hand(q, k, v, causal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(16, 16), (10, 23), (23, 10)])
def test_blockwise_gradients(n, m, causal):
    q, k, v = arrays(n, m)
    direction = jax.random.normal(jax.random.key(1), q.shape)

    def loss(f, **options):
        return lambda *qkv: (f(*qkv, causal=causal, **options) * direction).sum()

    got = jax.jit(jax.grad(loss(blockwise, block_q=4, block_k=8), argnums=(0, 1, 2)))(q, k, v)
    expected = jax.jit(jax.grad(loss(reference_attention), argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_blockwise_holds_no_score_matrix():
    """Neither pass has a temporary as large as the scores (here 32 MiB a head)."""
    x = jax.ShapeDtypeStruct((1, 2048, 2, 16), jnp.float32)

    def loss(q, k, v):
        return blockwise(q, k, v, causal=False).sum()

    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 2048 * 2 * 4 / 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_half_precision_stays_in_its_dtype(backend, dtype):
    q, k, v = arrays(12, 20, dtype=dtype)
    got = attention(q, k, v, backend=backend)
    assert got.dtype == dtype
    error = np.abs(np.asarray(got, np.float32) - by_hand(q, k, v, False)).max()
    assert error < 4 * float(jnp.finfo(dtype).eps)


def test_large_scores_do_not_overflow():
    q, k, v = (100 * x for x in arrays(6, 6))
    for backend in ("plain", "blockwise"):
        assert np.isfinite(attention(q, k, v, backend=backend)).all()


def test_unknown_backend():
    with pytest.raises(InputError, match="attention backend: got 'flush'"):
        attention(*arrays(2, 2), backend="flush")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), [(130, 130, 8), (256, 77, 40), (384, 640, 20)])
def test_tpu_kernel_interpreted(n, m, d, causal):
    """The kernel's own program, step by step on this machine, with lengths that need padding."""
    q, k, v = arrays(n, m, d)
    direction = jax.random.normal(jax.random.key(1), q.shape)

    def both(f, **options):
        def loss(q, k, v):
            out = f(q, k, v, causal=causal, **options)
            return (out * direction).sum(), out

        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        return jax.tree.leaves(grad(q, k, v))

    for a, b in zip(both(tpu, interpret=True), both(reference_attention), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("width", [40, 64, 80, 160, 512])
@pytest.mark.parametrize("keys", [LANES, 256, 1024, 2304, 4096, 9216])
@pytest.mark.parametrize("queries", [256, 1152, 4096, 9216])
def test_blocks_of_the_tpu_kernel(queries, keys, width):
    """They divide the tokens and have room in 16 MiB with the kernel's sums, scores and buffers."""
    cuts = query_splits(queries, width)
    assert queries % (cuts * LANES) == 0
    whole = (0, 8 * width * queries // cuts)  # gradients of the queries that are held
    sizes = block_sizes(queries, keys, width)[0], block_sizes(queries // cuts, keys, width)[1]
    for size, held in zip(sizes, whole, strict=True):
        assert queries // cuts % size.queries == 0 or not held
        assert queries % size.queries == 0
        assert keys % size.keys == 0
        assert size.keys % size.key_sub_block == 0
        assert all(length % LANES == 0 for length in dataclasses.astuple(size))
        arrays = 2 * 2 * width * (4 * size.queries + 4 * size.keys)  # bfloat16, twice
        scores = 3 * 4 * size.key_sub_block * size.queries
        sums = 4 * width * (2 * size.keys + size.queries)
        assert arrays + scores + sums + held <= 16 * 2**20


def test_tpu_kernel_takes_many_queries_in_pieces(monkeypatch):
    monkeypatch.setattr(attention_tpu, "VMEM_BUDGET", 128 * 8 * 8)
    assert query_splits(384, 8) == 3
    test_tpu_kernel_interpreted(384, 200, 8, causal=True)


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), [(256, 256, 64), (100, 77, 40)])
def test_cudnn(n, m, d, causal):
    """In a process of its own, for these tests run on the CPU."""
    program = pathlib.Path(__file__).with_name("compare_cudnn.py")
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, str(program), str(n), str(m), str(d), str(int(causal))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), [(256, 256, 64), (100, 77, 40), (63, 64, 12)])
def test_cudnn_is_given_what_it_takes(monkeypatch, n, m, d, causal):
    """Even numbers of tokens and heads by eights; by another implementation, the equation's."""
    real, given = jax.nn.dot_product_attention, []

    def elsewhere(q, k, v, *, implementation, **options):
        given.append((implementation, *q.shape[1::2], *k.shape[1::2]))
        return real(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", elsewhere)
    q, k, v = arrays(n, m, d, jnp.bfloat16)
    direction = jax.random.normal(jax.random.key(1), q.shape)

    def both(backend):
        def loss(q, k, v):
            out = backend(q, k, v, causal=causal).astype(jnp.float32)
            return (out * direction).sum(), out

        with jax.numpy_dtype_promotion("standard"):  # as jax's implementation wants it
            gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
            return jax.tree.leaves(gradient(q, k, v))

    for a, b in zip(both(cudnn), both(reference_attention), strict=True):
        wanted = np.asarray(b, np.float32)
        error = np.abs(np.asarray(a, np.float32) - wanted).max() / np.abs(wanted).max()
        assert error < 4 * float(jnp.finfo(jnp.bfloat16).eps)
    ((name, *sides),) = given
    assert name == "cudnn"
    assert all(side % 8 == 0 for side in sides)


def test_cudnn_refuses_what_it_cannot_do():
    with pytest.raises(InputError, match="dtype for cudnn attention: got 'float32'"):
        attention(*arrays(4, 4), backend="cudnn")
    with pytest.raises(InputError, match="head width for cudnn attention: got 160"):
        attention(*arrays(4, 4, 160, jnp.bfloat16), backend="cudnn")


@pytest.mark.parametrize(
    ("platform", "n", "m", "d", "dtype", "expected"),
    [
        ("cpu", 64, 64, 40, jnp.float32, "plain"),
        ("cpu", 1024, 77, 40, jnp.float32, "plain"),
        ("cpu", 1024, 1024, 40, jnp.float32, "blockwise"),
        ("cuda", 4096, 4096, 40, jnp.bfloat16, "cudnn"),
        ("cuda", 64, 64, 160, jnp.bfloat16, "plain"),
        ("cuda", 16384, 16384, 512, jnp.bfloat16, "blockwise"),
        ("cuda", 1024, 1024, 40, jnp.float32, "plain"),
        ("tpu", 4096, 4096, 40, jnp.bfloat16, "tpu"),
        ("tpu", 4096, 77, 40, jnp.bfloat16, "tpu"),
        ("tpu", 77, 77, 64, jnp.bfloat16, "plain"),
    ],
)
def test_choice(platform, n, m, d, dtype, expected):
    q = jax.ShapeDtypeStruct((2, n, 8, d), dtype)
    k = jax.ShapeDtypeStruct((2, m, 8, d), dtype)
    assert select_backend(platform, q, k) == expected


def test_auto_follows_the_platform_of_the_program(monkeypatch):
    """Sizes for which platforms differ: the one program here is the CPU's, with its gradient."""
    monkeypatch.setattr(attention_module, "has_tpu_compiler", lambda: True)
    q, k, v = arrays(1024, 1024)

    def loss(backend):
        return lambda q, k, v: jnp.square(attention(q, k, v, backend=backend)).sum()

    auto, blocked = (
        jax.jit(jax.grad(loss(b), argnums=(0, 1, 2)))(q, k, v) for b in ("auto", "blockwise")
    )
    for a, b in zip(auto, blocked, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("batch", "heads", "sizes", "spec"),
    [
        (8, 2, (8, 1, 1), PartitionSpec(("data",))),
        (8, 2, (2, 4, 1), PartitionSpec(("data", "fsdp"))),
        (4, 2, (2, 2, 2), PartitionSpec(("data", "fsdp"), None, "tensor")),
        (4, 3, (2, 2, 2), PartitionSpec(("data", "fsdp"))),
        (3, 2, (8, 1, 1), PartitionSpec()),
    ],
)
def test_tpu_kernel_is_divided_by_the_mesh(batch, heads, sizes, spec):
    """Each device has its part of the batch and of the heads, or all of what does not divide."""
    devices = np.array(jax.devices()).reshape(sizes)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    x = jax.random.normal(jax.random.key(0), (batch, 128, heads, 8))
    x = jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: tpu(x, x, x, causal=False, interpret=True))(x)
    assert out.sharding.is_equivalent_to(x.sharding, 4)
    expected = reference_attention(*[jnp.asarray(np.asarray(x))] * 3, causal=False)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_auto_under_a_mesh_and_under_pmap(monkeypatch):
    monkeypatch.setattr(attention_module, "has_tpu_compiler", lambda: True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    x = jax.random.normal(jax.random.key(0), (len(jax.devices()), 1024, 1, 4))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: attention(x, x, x))(sharded)
    assert out.sharding.is_equivalent_to(sharded.sharding, 4)
    mapped = jax.pmap(lambda x: attention(x, x, x))(x[:, None])
    np.testing.assert_allclose(out, mapped[:, 0], rtol=1e-4, atol=1e-5)


def test_auto_compiles_to_the_kernel_for_a_tpu_that_is_not_here(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    here = jax.sharding.SingleDeviceSharding(topology.devices[0])
    x = jax.ShapeDtypeStruct((2, 4096, 8, 40), jnp.bfloat16, sharding=here)
    compiled = jax.jit(attention).lower(x, x, x).compile()
    assert "attention_forward" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096
