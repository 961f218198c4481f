"""LoRA files (2106.09685) in the spellings that trainers write: low-rank changes of weights.

Names are looked up among the paths that the model has: underscores in them are ambiguous.
"""

import math
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.checkpoints import ldm_writer
from jaxdiff.checkpoints.jsonfiles import parse_object, read_object
from jaxdiff.checkpoints.key_mapping import path_to_torch_key, torch_shape
from jaxdiff.checkpoints.lora_names import parse, settings_file, weights_file
from jaxdiff.checkpoints.safetensors import TensorInfo, read_metadata, read_tensor
from jaxdiff.checkpoints.weights import read_weights
from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray

METADATA = "lora_adapter_metadata"  # diffusers' JSON with alphas, in the header of the file


class LoRAFactors(NamedTuple):
    """One weight's change, scale * up @ down, in PyTorch's layouts.

    Of a convolution `down` has its kernel, or, in Tucker form, `mid` (s, r, h, w) between two
    factors without.
    """

    down: Float[NDArray, "r ..."]
    up: Float[NDArray, "o ..."]
    mid: Float[NDArray, "s r h w"] | None
    scale: float  # alpha / r

    def delta(self, shape: tuple[int, ...]) -> Float[NDArray, "..."]:
        """The change of a weight of `shape`, in float32."""
        up = self.up.reshape(len(self.up), -1)
        if self.mid is None:
            return self.scale * (up @ self.down.reshape(len(self.down), -1)).reshape(shape)
        down = self.down.reshape(len(self.down), -1)
        return self.scale * np.einsum("os,srhw,ri->oihw", up, self.mid, down, optimize=True)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether `delta` has a meaning for a weight of `shape`."""
        if self.down.ndim < 2 or self.up.ndim < 2 or self.down.size == 0:
            return False
        r, outer, inner = len(self.down), len(self.up), self.down.shape[1:]
        if self.mid is not None:
            core = self.mid.shape
            return (
                len(shape) == 4
                and (outer, inner[0], *core[2:]) == shape
                and core[:2] == (int(np.prod(self.up.shape[1:])), r)
                and inner[1:] in ((), (1, 1))
            )
        flat = len(shape) == 2 or shape[2:] == (1, 1)
        alike = inner == shape[1:] or (
            flat and inner[:1] == shape[1:2] and inner[1:] in ((), (1, 1))
        )
        return outer == shape[0] and alike and int(np.prod(self.up.shape[1:])) == r


Changes = dict[str, dict[str, LoRAFactors]]  # component -> PyTorch key of a weight -> its change


def read_lora(source: pathlib.Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Changes:
    """The changes in a LoRA file, or in a folder with one.

    `shapes` are those of the weights of the model's components, by path and in its own layout.
    Raises InputError that lists what fits nothing.
    """
    path = weights_file(source)
    entries = read_weights(path)
    wanted = {name: _torch_shapes(table) for name, table in shapes.items()}
    names = _Names(wanted)
    groups: dict[tuple[str, str], dict[str, TensorInfo]] = defaultdict(dict)
    strange = []
    for name, entry in entries.items():
        found = names.find(name)
        if found is None or found[2] in groups[found[:2]]:
            strange.append(name)
        else:
            groups[found[:2]][found[2]] = entry
    scales = Scales(path)
    reject_unknown_keys(path, "names that fit nothing in this model", strange)
    changes: Changes = defaultdict(dict)
    unfit = []
    for (component, key), roles in groups.items():
        if not {"down", "up"} <= roles.keys():
            unfit.append(next(iter(roles.values())).name)
            continue
        factors = _factors(roles, component, key, scales)
        if not factors.fits(wanted[component][key]):
            unfit.append(roles["down"].name)
        changes[component][key] = factors
    reject_unknown_keys(path, "factors that fit no weight", unfit)
    if not changes:
        raise InputError(f"{path}: got no factors, expected a LoRA")
    return dict(changes)


def _torch_shapes(table: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """PyTorch keys and shapes of the matrices and kernels among a component's weights."""
    return {
        path_to_torch_key(path): torch_shape(shape, path)
        for path, shape in table.items()
        if path.endswith(".kernel")
    }


class _Names:
    """Names in LoRA files -> (component, PyTorch key, role)."""

    def __init__(self, wanted: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
        self._wanted = wanted
        self._flat: dict[str, dict[str, str]] = {}
        for component, keys in wanted.items():
            flat = {key.removesuffix(".weight").replace(".", "_"): key for key in keys}
            if component == "unet":
                spelled = ldm_writer.unet_to_ldm_keys(keys)
                flat |= {
                    old.removesuffix(".weight").replace(".", "_"): key
                    for key, old in spelled.items()
                }
            self._flat[component] = flat

    def find(self, name: str) -> tuple[str, str, str] | None:
        """Where `name` belongs; None if nowhere."""
        found = parse(name)
        if found is None:
            return None
        component, module = found.component, found.module
        if found.kohya:
            key = self._flat.get(component, {}).get(module)
            return None if key is None else (component, key, found.role)
        for key in (f"{module}.weight", f"text_model.{module}.weight"):
            if key in self._wanted.get(component, {}):
                return component, key, found.role
        return None


class Scales:
    """The scales alpha / r of the LoRA file at `path`."""

    def __init__(self, path: pathlib.Path) -> None:
        self._settings: Mapping[str, Any] = {}
        if beside := settings_file(path):
            self._settings = read_object(beside)
        elif path.suffix == ".safetensors":
            text = read_metadata(path).get(METADATA, "{}")
            self._settings = parse_object(text.encode(), f"{path} ({METADATA})")

    def _get(self, component: str, name: str) -> Any:
        return self._settings.get(f"{component}.{name}", self._settings.get(name))

    def scale(self, component: str, module: str, rank: int, alpha: TensorInfo | None) -> float:
        """The scale of a module's factors: of the tensor `alpha`, or of PEFT's settings, or 1."""
        if alpha is None:
            return self._from_settings(component, module, rank)
        if math.prod(alpha.shape) != 1:
            raise InputError(f"{alpha.path}: {alpha.name}: got {alpha.shape}, expected one number")
        # An alpha of 0 stands for none.
        return float(read_tensor(alpha).reshape(-1)[0]) / rank or 1.0

    def _from_settings(self, component: str, module: str, rank: int) -> float:
        alpha = self._get(component, "lora_alpha")
        patterns = self._get(component, "alpha_pattern")
        for pattern, own in patterns.items() if isinstance(patterns, Mapping) else ():
            # PEFT's pattern is the end of a module's path, after ^ all of it.
            if module == pattern.removeprefix("^") or module.endswith(f".{pattern}"):
                alpha = own
                break
        if not isinstance(alpha, int | float) or alpha == 0:
            return 1.0
        return alpha / (rank**0.5 if self._get(component, "use_rslora") else rank)


def _factors(
    roles: Mapping[str, TensorInfo], component: str, key: str, scales: Scales
) -> LoRAFactors:
    arrays = {
        role: read_tensor(entry).astype(np.float32)
        for role, entry in roles.items()
        if role != "alpha"
    }
    down = arrays["down"]
    rank = len(down) if down.ndim else 0
    module = key.removesuffix(".weight")
    scale = scales.scale(component, module, rank, roles.get("alpha")) if rank else 1.0
    return LoRAFactors(down, arrays["up"], arrays.get("mid"), scale)


def reject_unknown_keys(path: pathlib.Path, what: str, names: Iterable[str]) -> None:
    """InputError that lists `names`, if there are any, as `what` they are."""
    names = sorted(names)
    if names:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise InputError(f"{path}: {what}: got {len(names)} ({shown}), expected none")
