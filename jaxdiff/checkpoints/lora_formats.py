"""Formats of adapters: what each changes in a weight W, (o, i) or (o, i, h, w) as in PyTorch.

| format   | change of W, before the scale                        | source              |
| -------- | ---------------------------------------------------- | ------------------- |
| LoRA     | up @ down; Tucker's core between them                | 2106.09685, LyCORIS |
| LoHa     | (w1_a @ w1_b) * (w2_a @ w2_b)                        | 2108.06098, LyCORIS |
| LoKr     | kron(w1, w2)                                         | LyCORIS             |
| GLoRA    | b1 @ b2 + W @ a1 @ a2                                | 2306.07967, LyCORIS |
| (IA)^3   | W * v by rows or columns; PEFT stores 1 + v          | 2205.05638, LyCORIS |
| OFT      | R W - W, R of orthogonal blocks; PEFT: W R - W       | 2306.07280, LyCORIS |
| BOFT     | R_m ... R_1 W - W, blocks of a butterfly             | 2311.06243, LyCORIS |
| full     | a difference                                         | LyCORIS             |
| DoRA     | g V / |V| - W, V changed by another format           | 2402.09353, LyCORIS |

The scale of an adapter multiplies the whole change. At 0 the model is itself, and changes add up.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

NDArray = np.ndarray  # not from core.types, which waits for jax: `inspect` does not
Shape = tuple[int, ...]
Array = Float[NDArray, "..."]
MAX_TERMS = 100  # of a power series


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change(abc.ABC):
    """What a file changes in one weight; its tensors are the fields that `tensors` names."""

    name: ClassVar[str]
    tensors: ClassVar[Mapping[str, str]]  # regular expressions of the ends of names, by field
    needs_weight: ClassVar[bool] = False  # whether `delta` reads the values of the weight

    @classmethod
    def needed(cls) -> set[str]:
        """The tensors, by field, that none of this format lacks."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        return {name for name in cls.tensors if fields[name].default is dataclasses.MISSING}

    @classmethod
    def matches(cls, shapes: Mapping[str, Shape]) -> bool:
        """Whether the tensors of a module, by field, are those of this format."""
        return cls.needed() <= shapes.keys() <= cls.tensors.keys()

    @classmethod
    def options(cls, setting: Callable[[str], Any], module: str) -> dict[str, Any]:
        """Fields that PEFT's settings determine; raises ValueError for what is not supported."""
        del setting, module
        return {}

    @abc.abstractmethod
    def fits(self, shape: Shape) -> bool:
        """Whether `delta` has a meaning for a weight of `shape`."""

    @abc.abstractmethod
    def delta(self, weight: Array) -> Array:
        """The change of `weight`, in float32; only its shape counts unless `needs_weight`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Change):
    """A change that alpha / rank multiplies."""

    scale: float = 1.0

    @property
    @abc.abstractmethod
    def rank(self) -> int | None:
        """What alpha is divided by; None if alpha does not count."""


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
        inner, outer = _bare(own.a1.shape), _bare(own.a2.shape)
        return (*i, *outer[:1]) == inner == outer[::-1] and own._added().fits(shape)

    def delta(self, weight: Array) -> Array:
        own = self._ordered(weight.shape)
        first, second = (array.reshape(len(array), -1) for array in (own.a1, own.a2))
        product = np.einsum("oi...,ir,rj->oj...", weight, first, second, optimize=True)
        return self.scale * (own._added().delta(weight) + product)


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
        return weight * _along(self.weight, self._axis(weight.shape), weight.ndim)


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
        return weight * (_along(self.ia3_l, self.axis, weight.ndim) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(Change):
    """rescale * R^T W - W, R = (I + Q) (I - Q)^-1 in blocks of rows, Q = B - B^T.

    |Q| is at most alpha times the number of rows, unless alpha is 0.
    """

    name = "OFT"
    tensors: ClassVar = {"oft_blocks": "oft_blocks", "rescale": "rescale"}
    needs_weight = True
    ndim: ClassVar[int] = 3
    oft_blocks: Array  # (..., k, b, b)
    rescale: Array | None = None
    alpha: float = 0.0

    @classmethod
    def matches(cls, shapes: Mapping[str, Shape]) -> bool:
        return super().matches(shapes) and len(shapes["oft_blocks"]) == cls.ndim

    def fits(self, shape: Shape) -> bool:
        blocks, b, width = self.oft_blocks.shape[-3:]
        scaled = self.rescale is None or self.rescale.size == shape[0]
        return len(shape) > 1 and b == width and blocks * b == shape[0] and scaled

    def delta(self, weight: Array) -> Array:
        rotated = self._rotate(weight)
        if self.rescale is not None:
            rotated = rotated * _along(self.rescale, 0, weight.ndim)
        return (rotated - weight).astype(np.float32)

    def _rotations(self, rows: int) -> NDArray:
        q = self.oft_blocks.astype(np.float64)
        q = q - q.swapaxes(-1, -2)
        if self.alpha > 0:
            q = q * min(1.0, self.alpha * rows / (np.linalg.norm(q) + 1e-8))
        one = np.identity(q.shape[-1])
        return (one + q) @ np.linalg.inv(one - q)

    def _rotate(self, weight: Array) -> NDArray:
        rotations = self._rotations(len(weight))
        rows = weight.reshape(*rotations.shape[:2], -1)
        return np.einsum("knm,knx->kmx", rotations, rows).reshape(weight.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFT(OFT):
    """OFT in stages, W <- R W; the blocks of stage n take rows that are 2^n b / 2 apart."""

    name = "BOFT"
    ndim = 4

    def fits(self, shape: Shape) -> bool:
        stages, _, b, _ = self.oft_blocks.shape
        return super().fits(shape) and b % 2 == 0 and shape[0] % (2 ** (stages - 1) * b) == 0

    def _rotate(self, weight: Array) -> NDArray:
        rows, columns = len(weight), math.prod(weight.shape[1:])
        result = weight.reshape(rows, columns)
        for stage, rotations in enumerate(self._rotations(rows)):
            b = rotations.shape[-1]
            apart = 2**stage * b // 2
            paired = result.reshape(-1, 2, apart, columns).swapaxes(1, 2).reshape(-1, b, columns)
            turned = np.einsum("kij,kjx->kix", rotations, paired)
            result = turned.reshape(-1, apart, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        return result.reshape(weight.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftOFT(Change):
    """W R^T - W, R in blocks of columns, of the upper triangles of Q.

    R = (I - Q) (I + Q)^-1; with `terms` so many of I + 2 Q + 2 Q^2 + ..., the last of them halved.
    """

    name = "OFT"
    tensors: ClassVar = {"oft_R": r"oft_R(\.\w+)?\.weight"}
    needs_weight = True
    oft_R: Array  # noqa: N815 (PEFT's name; k, b (b - 1) / 2)
    terms: int | None = None

    @classmethod
    def options(cls, setting: Callable[[str], Any], module: str) -> dict[str, Any]:
        del module
        if setting("oft_block_size") is None and setting("r") is None:
            raise ValueError("OFT without PEFT's settings, expected adapter_config.json beside it")
        if setting("coft"):
            raise ValueError("coft true, expected false (constrained OFT is not supported)")
        if setting("use_cayley_neumann") is False:
            return {}
        terms = setting("num_cayley_neumann_terms")
        terms = 5 if terms is None else terms
        if not isinstance(terms, int) or not 0 < terms <= MAX_TERMS:
            raise ValueError(f"num_cayley_neumann_terms {terms!r}, expected 1 to {MAX_TERMS}")
        return {"terms": terms}

    @property
    def _block(self) -> int:
        """b, of the b (b - 1) / 2 numbers of a triangle; 0 for other numbers."""
        numbers = self.oft_R.shape[1]
        b = (1 + math.isqrt(1 + 8 * numbers)) // 2
        return b if b * (b - 1) // 2 == numbers else 0

    def fits(self, shape: Shape) -> bool:
        if self.oft_R.ndim != 2 or len(shape) < 2 or self._block == 0:
            return False
        columns = math.prod(shape[1:])
        shared = len(self.oft_R) == 1 and columns % self._block == 0
        return shared or len(self.oft_R) * self._block == columns

    def delta(self, weight: Array) -> Array:
        b = self._block
        columns = weight.reshape(len(weight), -1, b)
        turned = np.einsum(
            "okc,krc->okr", columns, np.broadcast_to(self._rotations(), (columns.shape[1], b, b))
        )
        return (turned.reshape(weight.shape) - weight).astype(np.float32)

    def _rotations(self) -> NDArray:
        b = self._block
        q = np.zeros((len(self.oft_R), b, b))
        q[:, *np.triu_indices(b, 1)] = self.oft_R
        q, one = q - q.swapaxes(-1, -2), np.identity(b)
        if self.terms is None:
            return (one - q) @ np.linalg.inv(one + q)
        # PEFT's loop adds a fourth term where three are asked for.
        halved = [2] * (self.terms - 1) if self.terms < 3 else [2] * (max(self.terms, 4) - 2) + [1]
        total, power = np.broadcast_to(one, q.shape), q
        for factor in halved:
            total, power = total + factor * power, power @ q
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference(Change):
    """A difference, of a weight, a bias or a norm."""

    name = "full"
    tensors: ClassVar = {"diff": "(diff|w_norm)"}
    diff: Array

    def fits(self, shape: Shape) -> bool:
        return _bare(self.diff.shape) == _bare(shape)

    def delta(self, weight: Array) -> Array:
        return self.diff.reshape(weight.shape)


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
        wanted = _along(self.norms, self.axis, weight.ndim)
        return changed * (wanted / (norms + np.finfo(np.float32).eps)) - weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swapped(Change):
    """Another format's change of the weight whose halves of the rows stand the other way."""

    name = "swapped halves"
    tensors: ClassVar = {}
    change: Change

    @property
    def needs_weight(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.change.needs_weight

    def fits(self, shape: Shape) -> bool:
        return shape[0] % 2 == 0 and self.change.fits(shape)

    def delta(self, weight: Array) -> Array:
        half = len(weight) // 2
        return np.roll(self.change.delta(np.roll(weight, half, axis=0)), half, axis=0)


FORMATS: tuple[type[Change], ...] = (
    LoRA,
    LoHa,
    LoKr,
    GLoRA,
    OFT,
    BOFT,
    PeftOFT,
    PeftIA3,
    Difference,
    IA3,  # its `.weight` is the end of others' names
)
BIASES = {"diff_b": "(diff_b|b_norm)", "lora_bias": r"lora_B(\.\w+)?\.bias"}
PEFT_ROLES = frozenset({"magnitude", "lora_bias", *PeftIA3.tensors, *PeftOFT.tensors})
# Names of tensors of other formats, which are refused.
UNSUPPORTED = {
    "embedding factors": r"\.(lora|oft)_embedding_\w+",
    "AdaLoRA": r"\.(lora_E|ranknum)\b",
    "VeRA": r"\.(vera_lambda_[bd]|vera_[AB])\b",
    "BOFT of PEFT": r"\.boft_[RsP]\b",
    "GLoRA of PEFT": r"\.glora_[A-E]\b",
    "Tucker factors of LoKr": r"\.lokr_t1$",
    "OFT of old LyCORIS": r"\.oft_diag$",
    "weights in place of the model's": r"\.(set_weight|reshape_weight)$|\.modules_to_save\b",
    "ControlNet-LLLite": r"^lllite_",
}


def format_of(shapes: Mapping[str, Shape]) -> type[Change] | None:
    """The format of a module's tensors, by field; None if they belong to none or to several."""
    return next((each for each in FORMATS if each.matches(shapes)), None)


def kind_of(shapes: Mapping[str, Shape]) -> str:
    """What to call a module's tensors, also where some are missing."""
    form = format_of(
        {r: s for r, s in shapes.items() if r not in ("alpha", *DoRA.tensors, *BIASES)}
    )
    form = form or next((each for each in FORMATS if shapes.keys() & each.tensors.keys()), None)
    if shapes.keys() & DoRA.tensors.keys():
        return DoRA.name if form in (LoRA, None) else f"{form.name} with {DoRA.name}"
    return Difference.name if form is None else form.name


def unsupported(name: str) -> str | None:
    """The format, which is not supported, of a tensor of this name; None if it has no such."""
    return next((kind for kind, form in UNSUPPORTED.items() if re.search(form, name)), None)


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


def _bare(shape: Shape) -> Shape:
    """A shape without the kernel of a 1 x 1 convolution."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _reshapes(got: Shape | None, shape: Shape) -> bool:
    """Whether a matrix of a weight's rows, flat or not, is one of `shape`."""
    if got is None or len(got) < 2 or len(shape) < 2:
        return False
    return got[0] == shape[0] and math.prod(got[1:]) == math.prod(shape[1:])


def _along(vector: Array, axis: int, ndim: int) -> Array:
    """The numbers of `vector` along one axis of `ndim`."""
    return vector.reshape([-1 if each == axis else 1 for each in range(ndim)])
