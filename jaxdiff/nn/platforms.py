"""One computation in several forms, by the platform that a program is compiled for."""

import functools
import importlib.util
from collections.abc import Callable

from jax import lax

from jaxdiff.core.types import PyTree

CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")  # what compiles for NVIDIA GPUs
CUDNN = "nvidia.cudnn"


@functools.cache
def has_tpu_compiler() -> bool:
    """Whether programs can be compiled for TPUs."""
    return installed("libtpu")


@functools.cache
def has_cudnn() -> bool:
    """Whether programs with cuDNN's kernels can be compiled for GPUs that are not here."""
    return any(map(installed, CUDA_PLUGINS)) and installed(CUDNN)


def installed(package: str) -> bool:
    """Whether there is such a package; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the one that it is in
        return False


def platform_dependent(
    *operands: PyTree, tpu: Callable[..., PyTree], default: Callable[..., PyTree]
) -> PyTree:
    """`tpu(*operands)` in programs for TPUs, `default(*operands)` in others."""
    if not has_tpu_compiler():
        return default(*operands)
    return lax.platform_dependent(*operands, tpu=tpu, default=default)
