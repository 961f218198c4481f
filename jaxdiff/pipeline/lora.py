"""LoRAs on a model's weights: any number, any strength, and off again without a trace.

Weights are arguments of the compiled programs, so that changing them compiles nothing. An array is
never written to: the weights from before stay the arrays that they are, and are put back as such.
"""

import pathlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.checkpoints.key_mapping import path_to_torch_key, to_jax, to_torch, torch_shape
from jaxdiff.checkpoints.lora import Changes, read_lora
from jaxdiff.checkpoints.lora_change import Change
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.models.build import param_dict, replace_weights
from jaxdiff.parallel.distributed import gather_to_host

MAX_SCALE = 100.0
Keys = tuple[str, ...]  # PyTorch keys of a parameter, or of several that are changed as one
ScaledChanges = dict[Keys, list[tuple[float, Change]]]


class LoRAManager:
    """The LoRAs of some modules, by name; `family` is what the model is called."""

    def __init__(self, modules: Mapping[str, nnx.Module], family: str) -> None:
        self._modules, self._family = modules, family
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
        self._changes[name] = read_lora(source, shapes, self._family)
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
            for path, delta in weight_changes(self._scaled(component, scales), now | originals):
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

    def _scaled(self, component: str, scales: Mapping[str, float]) -> ScaledChanges:
        """The changes of a component's parameters, and their scales."""
        found: ScaledChanges = defaultdict(list)
        for name, scale in scales.items():
            for target, change in self._changes[name].get(component, {}).items():
                if scale:
                    keys = (target,) if isinstance(target, str) else target
                    found[keys].append((scale, change))
        return found


def weight_changes(
    changes: ScaledChanges, weights: Mapping[str, Array]
) -> Iterator[tuple[str, np.ndarray]]:
    """The path of each changed weight and the sum of its changes, in PyTorch's layout and float32.

    `weights` are those before any change. Parameters that are changed together follow each other,
    so that few changes are in memory at once.
    """
    paths = {path_to_torch_key(path): path for path in weights}
    for group in _groups(changes):
        totals: dict[str, np.ndarray] = {}
        for keys in group:
            own = [paths[key] for key in keys]
            delta = _delta(changes[keys], {path: weights[path] for path in own})
            heights = [torch_shape(tuple(weights[path].shape), path)[0] for path in own]
            for path, part in zip(own, np.split(delta, np.cumsum(heights)[:-1]), strict=True):
                totals[path] = totals[path] + part if path in totals else part
        yield from totals.items()


def _groups(changes: Iterable[Keys]) -> list[list[Keys]]:
    """Lists of those with parameters in common, of which the longest in each has all."""
    groups: list[list[Keys]] = []
    places: dict[str, list[Keys]] = {}  # the group of each parameter
    for keys in sorted(changes, key=len, reverse=True):
        group = places.get(keys[0])
        if group is None:
            groups.append(group := [])
            places |= dict.fromkeys(keys, group)
        group.append(keys)
    return groups


def _delta(
    changes: Sequence[tuple[float, Change]], weights: Mapping[str, Array]
) -> Float[np.ndarray, "o ..."]:
    """The sum of scaled changes of the weights by path, which are one: their rows follow."""
    if any(change.needs_weight for _, change in changes):
        arrays = (gather_to_host(weight).astype(np.float32) for weight in weights.values())
        values = np.concatenate([to_torch(*each) for each in zip(arrays, weights, strict=True)])
    else:
        shapes = [torch_shape(tuple(weight.shape), path) for path, weight in weights.items()]
        rows = sum(shape[0] for shape in shapes)
        values = np.broadcast_to(np.float32(0), (rows, *shapes[0][1:]))
    first, *others = (scale * change.delta(values) for scale, change in changes)
    return sum(others, start=first)


def _check(name: str, scale: float) -> None:
    in_range(f"scale of LoRA {name}", scale, -MAX_SCALE, MAX_SCALE)


def _like(array: Array, other: Array) -> Array:
    """`array` on the devices of `other`."""
    return jax.device_put(array, other.sharding)
