"""Time and memory of the attention back ends that run on this machine, by number of tokens.

    python benchmarks/attention.py [--backends plain blockwise] [--tokens 256 1024] [--gradient]

The sizes are those of a UNet's self-attention for one guided image: batch 2, 8 heads of width 40.
Times are the best of five runs; memory is what the compiled program allocates besides its arguments
and results.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from jaxdiff.core.types import dtype_of
from jaxdiff.nn.attention import BACKENDS, attention


def measure(backend: str, tokens: int, dtype: str, gradient: bool) -> tuple[float, float]:
    """Milliseconds of a call and MiB of temporaries."""
    x = jax.random.normal(jax.random.key(0), (2, tokens, 8, 40), dtype_of(dtype))

    def forward(q, k, v):
        return attention(q, k, v, backend=backend)

    def loss(q, k, v):
        return forward(q, k, v).astype(jnp.float32).sum()

    function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else forward
    compiled = jax.jit(function).lower(x, x, x).compile()
    jax.block_until_ready(compiled(x, x, x))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, x, x))
        best = min(best, time.perf_counter() - start)
    memory = compiled.memory_analysis()
    return 1e3 * best, memory.temp_size_in_bytes / 2**20 if memory else float("nan")


def main() -> None:
    """Print one row for each number of tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["plain", "blockwise"], choices=BACKENDS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gradient", action="store_true", help="with the backward pass")
    args = parser.parse_args()
    what = "forward and backward" if args.gradient else "forward"
    print(f"{jax.devices()[0].device_kind}, {args.dtype}, {what}")
    print("tokens" + "".join(f"{name:>12} ms{'MiB':>9}" for name in args.backends))
    for tokens in args.tokens:
        results = [measure(name, tokens, args.dtype, args.gradient) for name in args.backends]
        print(f"{tokens:6d}" + "".join(f"{ms:15.1f}{mib:9.1f}" for ms, mib in results), flush=True)


if __name__ == "__main__":
    main()
