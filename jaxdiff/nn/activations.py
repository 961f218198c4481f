"""Activation functions by the names that checkpoint configs use."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import one_of


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x) with the Gaussian CDF itself, not its tanh approximation (Hendrycks & Gimpel)."""
    # In float32 for every dtype: half precision would lose erf's tail, and erfc, which keeps it, is
    # slow: on the CPU its gradient, on a TPU by the compiler's estimate all of it.
    x32 = x.astype(jnp.float32)
    return (x32 * (0.5 + 0.5 * lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(1.702 x), the sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def mish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x tanh(softplus(x)) (Misra 2019)."""
    return x * jnp.tanh(jax.nn.softplus(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": exact_gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "mish": mish,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation called `name` in a config; InputError for a name that is not in the table."""
    return ACTIVATIONS[one_of("activation", name, ACTIVATIONS)]
