"""LoRAs on a model's weights: any number, any strength, and off again without a trace.

Weights are arguments of the compiled programs, so that changing them compiles nothing. An array is
never written to: the weights from before stay the arrays that they are, and are put back as such.
"""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints.key_mapping import to_jax, torch_key_to_path, torch_shape
from jaxdiff.checkpoints.lora import Changes, read_lora
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.models.build import param_dict, replace_weights

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
            changed = dict(originals)
            for key, delta in self._deltas(component, scales).items():
                path = torch_key_to_path(key, delta.ndim)
                before = originals.setdefault(path, now[path])
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

    def _deltas(self, component: str, scales: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The sum of all changes of a component's weights, by PyTorch key and in its layout."""
        shapes = {p: tuple(a.shape) for p, a in param_dict(self._modules[component]).items()}
        total: dict[str, np.ndarray] = {}
        for name, scale in scales.items():
            for key, factors in self._changes[name].get(component, {}).items():
                path = torch_key_to_path(key, 2)
                delta = scale * factors.delta(torch_shape(shapes[path], path))
                total[key] = total[key] + delta if key in total else delta
        return total


def _check(name: str, scale: float) -> None:
    in_range(f"scale of LoRA {name}", scale, -MAX_SCALE, MAX_SCALE)


def _like(array: Array, other: Array) -> Array:
    """`array` on the devices of `other`."""
    return jax.device_put(array, other.sharding)
