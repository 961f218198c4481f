"""Array type aliases; shapes are written in signatures as `Float[Array, "b h w c"]`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key, PyTree, UInt8

from jaxdiff.core.validate import one_of

Array = jax.Array
Dtype = Any
NDArray = np.ndarray

DTYPES: dict[str, Dtype] = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
}


def dtype_of(name: str) -> Dtype:
    """The floating dtype called `name`: float32, bfloat16 or float16."""
    return DTYPES[one_of("dtype", name, DTYPES)]


__all__ = [
    "DTYPES",
    "Array",
    "Bool",
    "Dtype",
    "Float",
    "Int",
    "Key",
    "NDArray",
    "PyTree",
    "UInt8",
    "dtype_of",
]
