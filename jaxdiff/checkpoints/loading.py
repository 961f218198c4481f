"""Stored tensors into a module: matched by name, converted in layout and dtype, one at a time."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints import leftovers
from jaxdiff.checkpoints.key_aliases import canonical, without_ties
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, to_jax, to_torch, torch_shape
from jaxdiff.checkpoints.safetensors import (
    FLOAT8,
    FLOATS,
    NUMPY_DTYPES,
    LazyTensor,
    TensorInfo,
    read_tensor,
)
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Dtype
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.parallel.mesh import device_put_global

M = TypeVar("M", bound=nnx.Module)
# Where weights go; or a function that says it of a weight's path and shape.
Place = jax.sharding.Sharding | None
Placement = Place | Callable[[str, tuple[int, ...]], Place]

# Each holds one tensor on the host. Two keep reading, casting and transposing apart from the
# transfer; more only help where there are many cores.
WORKERS = min(4, os.cpu_count() or 1)


def load_into(
    module: M,
    entries: Mapping[str, TensorInfo],
    *,
    class_name: str,
    source: str,
    dtype: Dtype | None = None,
    float8_as: Dtype = jnp.bfloat16,
    sharding: Placement = None,
) -> M:
    """A copy of an abstract `module` with the stored tensors `entries` for weights.

    `dtype` None keeps the stored one, but turns 8-bit floats into `float8_as`. `sharding` says
    where a weight goes, or gives it by path and shape; None is the default device. The host holds
    no more than WORKERS tensors beside the result. Raises InputError, naming `source` or the file,
    before any tensor is read.
    """
    plan = match_keys(module, entries, class_name=class_name, source=source)

    def load(item: tuple[str, TensorInfo]) -> Array:
        path, entry = item
        values = read_tensor(entry)
        with np.errstate(over="ignore"):  # beyond float16's range is inf, as in PyTorch
            values = values.astype(
                stored_dtype(entry, float8_as) if dtype is None else dtype, copy=False
            )
        weight = to_jax(values, path)
        place = sharding(path, weight.shape) if callable(sharding) else sharding
        return jax.block_until_ready(place_weight(weight, place))

    with ThreadPoolExecutor(WORKERS) as pool:
        arrays = dict(zip(plan, pool.map(load, plan.items()), strict=True))
    return with_params(module, arrays)


def place_weight(view: np.ndarray, place: jax.sharding.Sharding | None) -> Array:
    """A weight of the host as an array of the device(s) of `place`; None: of the default device.

    XLA transposes strided arrays several times faster than numpy, and may take over the buffer of
    others, to which nothing else refers. It does so for every device, so that copies for several
    are better made from the first.
    """
    if isinstance(place, jax.sharding.NamedSharding) and not place.is_fully_addressable:
        return device_put_global(view, place)
    if place is not None and place.is_fully_replicated and place.is_fully_addressable:
        first = min(place.device_set, key=lambda device: device.id)
        return jax.device_put(jax.device_put(view, first), place)
    return jax.device_put(view, place)


def stored_dtype(entry: TensorInfo, float8_as: Dtype = jnp.bfloat16) -> Dtype:
    """The dtype in which a stored weight is kept: its own, but no float64 and no 8-bit float."""
    if entry.dtype in FLOAT8:
        return float8_as
    return np.float32 if entry.dtype == "F64" else NUMPY_DTYPES[entry.dtype]


def match_keys(
    module: nnx.Module, entries: Mapping[str, TensorInfo], *, class_name: str, source: str
) -> dict[str, TensorInfo]:
    """The stored tensor of every weight of `module`, by path.

    A warning counts tensors that are known to be passed over; InputError for all others that are
    missing, unknown or unfit.
    """
    stored: dict[str, TensorInfo] = {}
    for name in without_ties(entries.keys(), class_name=class_name):
        entry = entries[name]
        key = canonical(name, class_name=class_name)
        if key in stored:
            raise InputError(
                f"{entry.path}: got {name} and {stored[key].name}, expected one of them"
            )
        if key is not None:
            stored[key] = entry
    wanted = {path_to_torch_key(path): path for path in param_dict(module)}
    _reject(f"{source}: missing tensors", [key for key in wanted if key not in stored])
    more = {
        e.name: leftovers.kind_in_component(k, class_name)
        for k, e in stored.items()
        if k not in wanted
    }
    _reject(f"{source}: unknown tensors", [name for name, kind in more.items() if kind is None])
    leftovers.warn(source, [kind for kind in more.values() if kind is not None])
    shapes = param_dict(module)
    wrong = [_shape_error(stored[key], path, shapes[path].shape) for key, path in wanted.items()]
    _reject(f"{source}: unfit tensors", [text for text in wrong if text])
    return {path: stored[key] for key, path in wanted.items()}


def lazy_tensors(module: nnx.Module, *, dtype: Dtype | None = None) -> dict[str, LazyTensor]:
    """The weights of `module` as tensors to be written, by PyTorch key and in its layout."""
    return {
        path_to_torch_key(path): _lazy_tensor(path, array, dtype)
        for path, array in param_dict(module).items()
    }


def _lazy_tensor(path: str, array: Any, dtype: Dtype | None) -> LazyTensor:
    kind = np.dtype(array.dtype if dtype is None else dtype)

    def fetch() -> np.ndarray:
        return _fetch(array, kind, path)

    return LazyTensor(dtype=kind, shape=torch_shape(array.shape, path), fetch=fetch)


def _fetch(array: Any, kind: np.dtype, path: str) -> np.ndarray:
    """The values of a weight in PyTorch's layout and in C order."""
    values = to_torch(on_host(array, kind), path)
    host = _cpu()
    # XLA transposes several times faster than numpy.
    return np.ascontiguousarray(values if host is None else jax.device_put(values, host))


def on_host(array: Any, kind: np.dtype) -> np.ndarray:
    """The values of a weight in the dtype `kind`.

    By way of the CPU device, since an array on another one keeps the host copy that it gives.
    """
    host = _cpu()
    values = np.asarray(array if host is None else jax.device_put(array, host))
    return values.astype(kind, copy=False)


def host_memory() -> jax.sharding.Sharding | None:
    """Where weights are that no device computes with yet; None if JAX sees no CPU."""
    device = _cpu()
    return None if device is None else jax.sharding.SingleDeviceSharding(device)


def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None


def _shape_error(entry: TensorInfo, path: str, shape: tuple[int, ...]) -> str:
    """What keeps a stored tensor from being the weight at `path` of this shape; "" if it fits."""
    if entry.dtype not in (*FLOATS, *FLOAT8):
        return f"{entry.name} in {entry.dtype}, not F32, F16, BF16, F8_E4M3 or F8_E5M2"
    wanted = torch_shape(shape, path)
    return "" if entry.shape == wanted else f"{entry.name} {entry.shape}, not {wanted}"


def _reject(what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:3])
        more = ", ..." if len(names) > 3 else ""
        raise InputError(f"{what}: got {len(names)} ({shown}{more}), expected none")
