"""Random draws that belong to one image, whatever batch it is in."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdiff.core.types import Array, Float, Int, Key
from jaxdiff.core.validate import in_range

# Step i draws with fold_in(key, i); the start is a step number that no grid reaches.
INITIAL_NOISE_STEP = 2**31 - 1


def per_sample_keys(seeds: Sequence[int]) -> Key[Array, "b"]:
    """One key per image from its seed; seeds are below 2^32."""
    for seed in seeds:
        in_range("seed", seed, 0, 2**32 - 1)
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def step_noise(
    keys: Key[Array, "b"],
    step: int | Int[Array, ""] | Int[Array, "b"],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> Float[Array, "b *d"]:
    """Standard normal noise of `shape` for each image at its step."""

    def one(key: Key[Array, ""], step: Int[Array, ""]) -> Float[Array, "*d"]:
        return jax.random.normal(jax.random.fold_in(key, step), shape, dtype)

    return jax.vmap(one)(keys, jnp.broadcast_to(jnp.asarray(step), keys.shape))


def initial_noise(keys: Key[Array, "b"], shape: tuple[int, ...]) -> Float[Array, "b *d"]:
    """The standard normal latents of `shape` (h, w, c) that each image starts from, in float32."""
    return step_noise(keys, INITIAL_NOISE_STEP, shape, jnp.dtype(jnp.float32))
