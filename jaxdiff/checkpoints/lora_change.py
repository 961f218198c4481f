"""What an adapter changes in one weight, (o, i) or (o, i, h, w) as in PyTorch."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

NDArray = np.ndarray  # not from core.types, which waits for jax: `inspect` does not
Shape = tuple[int, ...]
Array = Float[NDArray, "..."]


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
class Difference(Change):
    """A difference, of a weight, a bias or a norm."""

    name = "full"
    tensors: ClassVar = {"diff": "(diff|w_norm)"}
    diff: Array

    def fits(self, shape: Shape) -> bool:
        return drop_1x1_kernel(self.diff.shape) == drop_1x1_kernel(shape)

    def delta(self, weight: Array) -> Array:
        return self.diff.reshape(weight.shape)


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


def drop_1x1_kernel(shape: Shape) -> Shape:
    """A shape without the kernel of a 1 x 1 convolution."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def along(vector: Array, axis: int, ndim: int) -> Array:
    """The numbers of `vector` along one axis of `ndim`."""
    return vector.reshape([-1 if each == axis else 1 for each in range(ndim)])
