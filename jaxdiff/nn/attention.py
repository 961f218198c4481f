"""Scaled dot-product attention: one function, several back ends that agree to rounding.

softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1), scores and softmax in float32.
Arrays are (batch, tokens, heads, head width); with `causal`, query i sees the keys j <= i.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import one_of
from jaxdiff.nn.attention_blockwise import blockwise
from jaxdiff.nn.attention_cudnn import CUDNN_DTYPES, CUDNN_WIDTH, cudnn
from jaxdiff.nn.attention_tpu import tpu
from jaxdiff.nn.platforms import has_cudnn, has_tpu_compiler

Q = Float[Array, "b n h d"]
KV = Float[Array, "b m h d"]


def reference_attention(
    q: Q,
    k: KV,
    v: KV,
    *,
    causal: bool = False,
    bias: Float[Array, "_ h n m"] | None = None,
    scale: float | None = None,
) -> Q:
    """Attention as the equation says, holding the full (b, h, n, m) score matrix.

    `scale` None is 1 / sqrt(d). A `bias`, of each text or of all, is added to the scaled scores.
    """
    # Heads first: XLA on the CPU multiplies strided heads several times slower.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        scores += bias
    if causal:
        seen = jnp.tri(q.shape[2], k.shape[2], dtype=bool)
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhnm,bhmd->bhnd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).swapaxes(1, 2)


BACKENDS: dict[str, Callable[..., Array]] = {
    "plain": reference_attention,
    "blockwise": blockwise,
    "cudnn": cudnn,
    "tpu": tpu,
}

# From how many scores a head "auto" leaves the full matrix. CPU: benchmarks/attention.py.
# Elsewhere loops are slow, so only for memory's sake: 4096 x 4096 scores are 64 MiB a head.
BLOCKWISE_FROM = {"cpu": 512 * 512, "cuda": 4096 * 4096, "tpu": 4096 * 4096}
CUDNN_FROM = 128 * 128  # below, starting another kernel costs more than the scores
TPU_FROM = 256  # queries; below, whole registers of them are mostly padding


def select_backend(platform: str, q: Q | jax.ShapeDtypeStruct, k: KV | jax.ShapeDtypeStruct) -> str:
    """The back end that "auto" means on `platform` ("cpu", "cuda" or "tpu") for these arrays."""
    n, m, width = q.shape[1], k.shape[1], q.shape[3]
    if platform == "tpu" and n >= TPU_FROM:
        return "tpu"
    fits = q.dtype.name in CUDNN_DTYPES and width <= CUDNN_WIDTH
    if platform == "cuda" and fits and n * m >= CUDNN_FROM:
        return "cudnn"
    return "blockwise" if n * m >= BLOCKWISE_FROM[platform] else "plain"


def attention(q: Q, k: KV, v: KV, *, causal: bool = False, backend: str = "auto") -> Q:
    """Attention of queries over keys and values, in q's dtype.

    `backend` is a name in BACKENDS or "auto", which chooses by size and by the platform that the
    program is compiled for. InputError for any other name.
    """
    one_of("attention backend", backend, ["auto", *BACKENDS])
    if backend != "auto":
        return _run(q, k, v, causal=causal, choices=(("default", backend),))
    # A program can be compiled for devices that are not here.
    others = {"tpu": has_tpu_compiler(), "cuda": _flash_gpu()}
    platforms = ["cpu", *(name for name, there in others.items() if there)]
    choices = tuple((platform, select_backend(platform, q, k)) for platform in platforms)
    if len({name for _, name in choices}) == 1:
        choices = (("default", choices[0][1]),)
    return _run(q, k, v, causal=causal, choices=choices)


# Compiled by itself so that the many layers of one shape are traced once.
@functools.partial(jax.jit, static_argnames=("causal", "choices"))
def _run(q: Q, k: KV, v: KV, *, causal: bool, choices: tuple[tuple[str, str], ...]) -> Q:
    branches = {
        platform: functools.partial(BACKENDS[name], causal=causal) for platform, name in choices
    }
    if len(branches) == 1:
        return branches["default"](q, k, v)
    return lax.platform_dependent(q, k, v, **branches, default=branches["cpu"])


ATTENTION_JIT_NAME = "_run"  # of attention as a whole in a traced program


def _flash_gpu() -> bool:
    """Whether a program may be for NVIDIA GPUs of compute capability 8 (Ampere) or later.

    They are this process's devices, or there is no GPU and what compiles for others is installed.
    """
    device = jax.devices()[0]
    if not device.device_kind.startswith(("NVIDIA", "Tesla")):
        return has_cudnn()
    return int(str(device.compute_capability).split(".")[0]) >= 8
