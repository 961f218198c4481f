"""Changes of a weight that are products of small matrices: LoRA, LoHa, LoKr and GLoRA."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from jaxdiff.checkpoints.lora_change import Array, Scaled, Shape, drop_1x1_kernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Scaled):
    """scale * up @ down. Of a convolution `down` has the kernel, or `mid` (s, r, h, w) has."""

    name = "LoRA"
    tensors: ClassVar = {
        "down": "lora_down.weight",
        "up": "lora_up.weight",
        "mid": "lora_mid.weight",
    }
    down: Array  # (r, ...)
    up: Array  # (o, ...)
    mid: Array | None = None  # (s, r, h, w)

    @property
    def rank(self) -> int:
        return len(self.down)

    def fits(self, shape: Shape) -> bool:
        if self.down.ndim < 2 or self.up.ndim < 2 or len(shape) < 2:
            return False
        r, outer, inner = len(self.down), len(self.up), self.down.shape[1:]
        if self.mid is not None:
            core = self.mid.shape
            return (
                len(shape) == 4
                and (outer, inner[0], *core[2:]) == shape
                and core[:2] == (math.prod(self.up.shape[1:]), r)
                and inner[1:] in ((), (1, 1))
            )
        flat = len(shape) == 2 or shape[2:] == (1, 1)
        alike = inner == shape[1:] or (
            flat and inner[:1] == shape[1:2] and inner[1:] in ((), (1, 1))
        )
        return outer == shape[0] and alike and math.prod(self.up.shape[1:]) == r

    def delta(self, weight: Array) -> Array:
        up, down = (array.reshape(len(array), -1) for array in (self.up, self.down))
        if self.mid is None:
            return self.scale * (up @ down).reshape(weight.shape)
        return self.scale * np.einsum("os,srhw,ri->oihw", up, self.mid, down, optimize=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(Scaled):
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise."""

    name = "LoHa"
    tensors: ClassVar = {
        name: name
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    }
    hada_w1_a: Array
    hada_w1_b: Array
    hada_w2_a: Array
    hada_w2_b: Array
    hada_t1: Array | None = None  # (r, s, h, w)
    hada_t2: Array | None = None  # (r, s, h, w)

    @property
    def rank(self) -> int:
        return len(self.hada_w1_b)

    def _matrices(self) -> "tuple[_Matrix, _Matrix]":
        return (
            _Matrix(self.hada_w1_a, self.hada_w1_b, self.hada_t1),
            _Matrix(self.hada_w2_a, self.hada_w2_b, self.hada_t2),
        )

    def fits(self, shape: Shape) -> bool:
        return all(_reshapes(matrix.shape, shape) for matrix in self._matrices())

    def delta(self, weight: Array) -> Array:
        one, two = (matrix.value().reshape(weight.shape) for matrix in self._matrices())
        return self.scale * (one * two)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Scaled):
    """scale * kron(w1, w2), where each may be a product w_a @ w_b."""

    name = "LoKr"
    tensors: ClassVar = {
        f"lokr_{name}": f"lokr_{name}"
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    }
    lokr_w1: Array | None = None  # (p, j)
    lokr_w1_a: Array | None = None
    lokr_w1_b: Array | None = None
    lokr_w2: Array | None = None
    lokr_w2_a: Array | None = None
    lokr_w2_b: Array | None = None
    lokr_t2: Array | None = None  # (r, s, h, w)

    @classmethod
    def matches(cls, shapes: Mapping[str, Shape]) -> bool:
        for w in ("lokr_w1", "lokr_w2"):
            if shapes.keys() & {w, f"{w}_a", f"{w}_b"} not in ({w}, {f"{w}_a", f"{w}_b"}):
                return False
        core = "lokr_t2" not in shapes or "lokr_w2_a" in shapes
        return core and shapes.keys() <= cls.tensors.keys()

    @property
    def rank(self) -> int | None:
        # Writers put anything into the alpha of two whole factors.
        second = self.lokr_w1_b if self.lokr_w2_b is None else self.lokr_w2_b
        return None if second is None else len(second)

    def _matrices(self) -> "tuple[_Matrix, _Matrix]":
        return (
            _Matrix(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b),
            _Matrix(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2),
        )

    def fits(self, shape: Shape) -> bool:
        one, two = (matrix.shape for matrix in self._matrices())
        if one is None or two is None or len(one) != 2 or len(two) < 2 or len(shape) < 2:
            return False
        if shape[1] % one[1]:
            return False
        kernel = len(two) < 4 or two[2:] == shape[2:]
        return kernel and _reshapes((one[0] * two[0], one[1] * math.prod(two[1:])), shape)

    def delta(self, weight: Array) -> Array:
        one, two = (matrix.value() for matrix in self._matrices())
        return self.scale * np.kron(one, two.reshape(len(two), -1)).reshape(weight.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLoRA(Scaled):
    """scale * (b1 @ b2 + W @ a1 @ a2); older files have the two of each pair the other way."""

    name = "GLoRA"
    tensors: ClassVar = {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")}
    needs_weight = True
    a1: Array
    a2: Array
    b1: Array
    b2: Array
    bm: Array | None = None  # (s, r, h, w)

    @property
    def rank(self) -> int:
        return min(self.a1.shape[:2])

    def _ordered(self, shape: Shape) -> "GLoRA":
        """Itself as files have it today."""
        if self.a1.shape[:1] == shape[1:2] and self.b1.shape[:1] == shape[:1]:
            return self
        return dataclasses.replace(self, a1=self.a2, a2=self.a1, b1=self.b2, b2=self.b1)

    def _added(self) -> LoRA:
        return LoRA(down=self.b2, up=self.b1, mid=self.bm)

    def fits(self, shape: Shape) -> bool:
        own, i = self._ordered(shape), shape[1:2]
        inner, outer = drop_1x1_kernel(own.a1.shape), drop_1x1_kernel(own.a2.shape)
        return (*i, *outer[:1]) == inner == outer[::-1] and own._added().fits(shape)

    def delta(self, weight: Array) -> Array:
        own = self._ordered(weight.shape)
        first, second = (array.reshape(len(array), -1) for array in (own.a1, own.a2))
        product = np.einsum("oi...,ir,rj->oj...", weight, first, second, optimize=True)
        return self.scale * (own._added().delta(weight) + product)


class _Matrix:
    """A matrix: whole, or a @ b (r first in b), or Tucker's core between a (r, o) and b (s, i)."""

    def __init__(self, *factors: Array | None) -> None:
        self._factors = [factor for factor in factors if factor is not None]

    @property
    def shape(self) -> Shape | None:
        """None if the factors do not go together."""
        first, *others = (factor.shape for factor in self._factors)
        if not others:
            return first
        second, *core = others
        if core:
            dimensions = (len(first), len(second), len(core[0]))
            fit = dimensions == (2, 2, 4) and core[0][:2] == (first[0], second[0])
            return (first[1], second[1], *core[0][2:]) if fit else None
        fit = len(first) == 2 <= len(second) and first[1] == second[0]
        return (first[0], *second[1:]) if fit else None

    def value(self) -> Array:
        """The matrix, in the shape of its factors."""
        first, *others = self._factors
        if not others:
            return first
        second, *core = others
        if core:
            return np.einsum("rshw,ro,si->oihw", core[0], first, second, optimize=True)
        return (first @ second.reshape(len(second), -1)).reshape(len(first), *second.shape[1:])


def _reshapes(got: Shape | None, shape: Shape) -> bool:
    """Whether a matrix of a weight's rows, flat or not, is one of `shape`."""
    if got is None or len(got) < 2 or len(shape) < 2:
        return False
    return got[0] == shape[0] and math.prod(got[1:]) == math.prod(shape[1:])
