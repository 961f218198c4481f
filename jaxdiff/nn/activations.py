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


@jax.custom_vjp
def gated_gelu(x: Float[Array, "..."], gate: Float[Array, "..."]) -> Float[Array, "..."]:
    """x gelu(gate). The backward pass recomputes the Gaussian CDF from the gate.

    It is float32 in every dtype, so saving it costs a TPU more than computing it.
    """
    return x * exact_gelu(gate)


def _gated_gelu_fwd(x: Array, gate: Array) -> tuple[Array, tuple[Array, Array]]:
    return gated_gelu(x, gate), (x, gate)


def _gated_gelu_bwd(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, gate = residuals[0], lax.optimization_barrier(residuals[1])  # or XLA saves it all the same
    return jax.vjp(lambda x, gate: x * exact_gelu(gate), x, gate)[1](d_out)


gated_gelu.defvjp(_gated_gelu_fwd, _gated_gelu_bwd)


def tanh_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, an approximation of GELU (1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


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
    "gelu-approximate": tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "mish": mish,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation called `name` in a config; InputError for a name that is not in the table."""
    return ACTIVATIONS[one_of("activation", name, ACTIVATIONS)]
