"""One computation in several forms, by the platform that a program is compiled for."""

import functools
import importlib.util
from collections.abc import Callable

from jax import lax

from jaxdiff.core.types import PyTree


@functools.cache
def tpu_compiler() -> bool:
    """Whether programs can be compiled for TPUs: where not, none needs a form for them."""
    return importlib.util.find_spec("libtpu") is not None


def on_tpus(
    *operands: PyTree, tpu: Callable[..., PyTree], otherwise: Callable[..., PyTree]
) -> PyTree:
    """`tpu` of the operands in programs for TPUs, `otherwise` of them in others."""
    if not tpu_compiler():
        return otherwise(*operands)
    return lax.platform_dependent(*operands, tpu=tpu, default=otherwise)
