"""LoRAs on a model's weights: any number, any strength, and off again without a trace.

Weights are arguments of the compiled programs, so that changing them compiles nothing. An array is
never written to: the weights from before stay the arrays that they are, and are put back as such.
"""

import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints.key_mapping import path_to_torch_key, to_jax, to_torch, torch_shape
from jaxdiff.checkpoints.lora import Changes, read_lora
from jaxdiff.checkpoints.lora_formats import Change
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.models.build import param_dict, replace_weights
from jaxdiff.parallel.distributed import gather_to_host

MAX_SCALE = 100.0


class LoRAManager:
    """The LoRAs of some modules, by name."""

    def __init__(self, modules: Mapping[str, nnx.Module]) -> None:
        self._modules = modules
        self._changes: dict[str, Changes] = {}
        self._originals: dict[str, dict[str, Array]] = {name: {} for name in modules}
        self.scales: dict[str, float] = {}

    def load(self, source: pathlib.Path, name: str | None, scale: float) -> str:
        """Read a LoRA and apply it; returns its name, by default that of its file."""
        name = source.stem if name is None else name
        if name in self._changes:
            raise InputError(f"lora: got {name!r} twice, expected another name")
        shapes = {
            component: {path: tuple(array.shape) for path, array in param_dict(module).items()}
            for component, module in self._modules.items()
        }
        _check(name, scale)
        self._changes[name] = read_lora(source, shapes)
        self.set(self.scales | {name: scale})
        return name

    def set(self, scales: Mapping[str, float]) -> None:
        """Apply the LoRAs with these scales; one that is left out is not applied, but stays."""
        for name, scale in scales.items():
            if not self._changes:
                raise InputError(f"lora: got {name!r}, expected one that is loaded (none is)")
            one_of("lora", name, self._changes)
            _check(name, scale)
        for component, module in self._modules.items():
            originals = self._originals[component]
            now = param_dict(module)
            paths = {path_to_torch_key(path): path for path in now}
            changed = dict(originals)
            for key, changes in self._scaled(component, scales).items():
                path = paths[key]
                before = originals.setdefault(path, now[path])
                delta = _delta(changes, before, path)
                total = before.astype(jnp.float32) + jnp.asarray(to_jax(delta, path))
                changed[path] = _like(total.astype(before.dtype), before)
            if changed:
                replace_weights(module, changed)
        self.scales = dict(scales)

    def remove(self) -> None:
        """Take all LoRAs off: the weights are the arrays that they were before."""
        self.set({})
        self._changes.clear()
        self._originals = {name: {} for name in self._modules}

    def _scaled(
        self, component: str, scales: Mapping[str, float]
    ) -> dict[str, list[tuple[float, Change]]]:
        """The changes of each parameter of a component, by PyTorch key, and their scales."""
        found: dict[str, list[tuple[float, Change]]] = defaultdict(list)
        for name, scale in scales.items():
            for key, change in self._changes[name].get(component, {}).items():
                if scale:
                    found[key].append((scale, change))
        return found


def _delta(changes: Sequence[tuple[float, Change]], weight: Array, path: str) -> np.ndarray:
    """The sum of scaled changes of the weight at `path`, in PyTorch's layout and float32."""
    if any(change.needs_weight for _, change in changes):
        values = to_torch(gather_to_host(weight).astype(np.float32), path)
    else:
        values = np.broadcast_to(np.float32(0), torch_shape(tuple(weight.shape), path))
    first, *others = (scale * change.delta(values) for scale, change in changes)
    return sum(others, start=first)


def _check(name: str, scale: float) -> None:
    in_range(f"scale of LoRA {name}", scale, -MAX_SCALE, MAX_SCALE)


def _like(array: Array, other: Array) -> Array:
    """`array` on the devices of `other`."""
    return jax.device_put(array, other.sharding)
