"""One computation in several forms, by the platform that a program is compiled for."""

import functools
import importlib.util
from collections.abc import Callable

from jax import lax

from jaxdiff.core.types import PyTree

CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")  # what compiles for NVIDIA GPUs
CUDNN = "nvidia.cudnn"


@functools.cache
def tpu_compiler() -> bool:
    """Whether programs can be compiled for TPUs: where not, none needs a form for them."""
    return installed("libtpu")


@functools.cache
def cudnn_compiler() -> bool:
    """Whether programs with cuDNN's kernels can be compiled for GPUs that are not here."""
    return any(map(installed, CUDA_PLUGINS)) and installed(CUDNN)


def installed(package: str) -> bool:
    """Whether there is such a package; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the one that it is in
        return False


def on_tpus(
    *operands: PyTree, tpu: Callable[..., PyTree], otherwise: Callable[..., PyTree]
) -> PyTree:
    """`tpu` of the operands in programs for TPUs, `otherwise` of them in others."""
    if not tpu_compiler():
        return otherwise(*operands)
    return lax.platform_dependent(*operands, tpu=tpu, default=otherwise)
