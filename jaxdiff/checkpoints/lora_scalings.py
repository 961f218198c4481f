"""Changes of a weight that scale its rows or columns: (IA)^3 and DoRA."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from jaxdiff.checkpoints.lora_change import Array, Change, Shape, along


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Change):
    """W * v by rows, or by columns if `on_input`; v is an offset from 1."""

    name = "(IA)^3"
    tensors: ClassVar = {"weight": "weight", "on_input": "on_input"}
    needs_weight = True
    weight: Array
    on_input: Array | None = None

    def _axis(self, shape: Shape) -> int:
        if self.on_input is not None:
            return int(self.on_input.any())
        return int(self.weight.size != shape[0])  # LyCORIS's default, as far as it fits

    def fits(self, shape: Shape) -> bool:
        return len(shape) > 1 and self.weight.size == shape[self._axis(shape)]

    def delta(self, weight: Array) -> Array:
        return weight * along(self.weight, self._axis(weight.shape), weight.ndim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftIA3(Change):
    """W * l - W by rows, which the bias shares, or by columns of feed-forward layers."""

    name = "(IA)^3"
    tensors: ClassVar = {"ia3_l": "ia3_l"}
    needs_weight = True
    ia3_l: Array  # (o, 1), (1, i) or (1, n, 1, 1)
    feedforward: bool | None = None  # the shape tells it, but for convolutions

    @classmethod
    def options(cls, setting: Callable[[str], Any], module: str) -> dict[str, Any]:
        found = setting("feedforward_modules")
        if isinstance(found, str):
            return {"feedforward": re.fullmatch(found, module) is not None}
        return {"feedforward": module.endswith(tuple(found))} if isinstance(found, list) else {}

    @property
    def axis(self) -> int:
        """The axis of the weight that is scaled."""
        return int(self.ia3_l.shape[1] != 1) if self.ia3_l.ndim == 2 else int(self.feedforward or 0)

    def fits(self, shape: Shape) -> bool:
        known = self.ia3_l.ndim == 2 or self.feedforward is not None
        return known and self.axis < len(shape) and self.ia3_l.size == shape[self.axis]

    def delta(self, weight: Array) -> Array:
        return weight * (along(self.ia3_l, self.axis, weight.ndim) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(Change):
    """g V / |V| - W, V = W + the change by another format; norms of rows or columns."""

    name = "DoRA"
    tensors: ClassVar = {
        "dora_scale": "dora_scale",
        "magnitude": r"lora_magnitude_vector(\.\w+)*",
    }
    needs_weight = True
    change: Change
    norms: Array  # (n,)
    axis: int  # along which they lie: 0 for those of rows

    @classmethod
    def of(cls, change: Change, tensors: Mapping[str, Array]) -> "DoRA":
        """DoRA on `change`: `dora_scale` (o, 1, ...) or (1, i, ...), or PEFT's `magnitude` (o,)."""
        ((role, norms),) = tensors.items()
        axis = int(role == "dora_scale" and norms.shape[:1] != (norms.size,))
        return cls(change=change, norms=norms.reshape(-1), axis=axis)

    def fits(self, shape: Shape) -> bool:
        return len(shape) > 1 and self.change.fits(shape) and self.norms.size == shape[self.axis]

    def delta(self, weight: Array) -> Array:
        changed = weight + self.change.delta(weight)
        others = tuple(axis for axis in range(weight.ndim) if axis != self.axis)
        norms = np.sqrt(np.sum(changed * changed, axis=others, keepdims=True))
        wanted = along(self.norms, self.axis, weight.ndim)
        return changed * (wanted / (norms + np.finfo(np.float32).eps)) - weight
