"""What a guidance rule is: its streams, what it is asked and told, and how rules wrap one another.

A rule sees the raw outputs of its streams, since some rules are defined in that space, and gives
one prediction; so it may convert first and combine denoised images, and it may return a
`Prediction` whose noise belongs to another stream than its image. Rules are frozen dataclasses and
pytrees: their numbers can be traced, so that another value compiles nothing.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Array, Bool, Float, Int, PyTree
from jaxdiff.core.validate import in_range
from jaxdiff.diffusion.predictions import Prediction, per_image, predict, target
from jaxdiff.diffusion.timesteps import NoiseLevel

Number = float | Float[Array, ""]
T = TypeVar("T")


class Stream(NamedTuple):
    """One of the ways in which a rule has each image denoised."""

    words: str = "prompt"  # "prompt"; "null"; "negative": the negative prompt, or null without one
    part: int = 0  # which of several prompts of one image
    network: str = "main"  # "main", or "guide" for a second, weaker one
    perturbed: bool = False  # with self-attention switched off in the middle of the network


class Dials(NamedTuple):
    """What each image may set for itself."""

    scale: Float[Array, "b"]  # w
    negative: Float[Array, "b"] | None = None  # the weight of a negative stream of its own
    weights: Float[Array, "b n"] | None = None  # of several prompts; None: 1 each


class Query(NamedTuple):
    """What the network was asked: noisy images, their noise level, the kind of its predictions."""

    x: Float[Array, "b *d"]
    level: NoiseLevel
    kind: str

    def predict(self, output: Float[Array, "b *d"], kind: str | None = None) -> Prediction:
        """The image and the noise that `output` means, as a prediction of `kind`."""
        return predict(kind or self.kind, output, self.x, self.level.alpha, self.level.sigma)

    def output(self, prediction: Prediction) -> Float[Array, "b *d"]:
        """The output of the network that means `prediction`: the inverse of `predict`."""
        return target(self.kind, *prediction, self.level.alpha, self.level.sigma)

    def denoised(self, D: Float[Array, "b *d"]) -> Prediction:
        """The image D with the noise that belongs to it."""
        return self.predict(D, "sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """A guidance rule."""

    @property
    @abstractmethod
    def streams(self) -> tuple[Stream, ...]:
        """The K streams; `combine` gets their outputs in this order."""

    @property
    @abstractmethod
    def plain(self) -> int | None:
        """The stream that is the conditional model without guidance; None: it takes several."""

    @abstractmethod
    def combine(
        self,
        outputs: tuple[Float[Array, "b *d"], ...],
        query: Query,
        dials: Dials,
        memory: PyTree,
    ) -> tuple[Prediction, PyTree]:
        """One prediction from the outputs of the streams, and the new memory."""

    def ends(
        self, outputs: tuple[Float[Array, "b *d"], ...], dials: Dials
    ) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
        """Raw outputs that guidance goes away from, and those of the plain conditional model.

        The first stream and the plain one, unless a rule makes them of several.
        """
        del dials
        return outputs[0], outputs[self.plain or 0]

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """The memory before the first step."""
        del x
        return ()

    def active(self, level: NoiseLevel, memory: PyTree) -> bool | Bool[Array, ""]:
        """Whether the rule guides here; where not, one plain stream is run and `rest` is asked."""
        del level, memory
        return True

    def still(self, level: NoiseLevel) -> bool | Bool[Array, ""]:
        """Whether x stands still here: no network is asked, and the velocity eps - D is 0."""
        del level
        return False

    def phase(self, level: NoiseLevel) -> int | Int[Array, ""]:
        """A number for the formula in force here; where it changes samplers forget their past."""
        del level
        return 0

    def rest(self, cond: Float[Array, "b *d"], query: Query) -> Prediction:
        """The prediction where the rule does not guide, from the output of the plain model."""
        return query.predict(cond)

    def cheapest(self, scales: Sequence[float]) -> "Guidance":
        """The rule with the fewest streams that does the same for images with these scales."""
        del scales
        return self

    def composed(self, prompts: int) -> "Guidance":
        """The rule for images that have so many prompts each; InputError if there is none."""
        if prompts == 1:
            return self
        raise InputError(f"prompt: got {prompts} parts, expected 1 with this guidance")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def rule(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a pytree of its numbers and of the rule that it wraps."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(made)  # pyright: ignore[reportArgumentType]
    moving = [f.name for f in fields if f.type in (Number, Guidance)]
    fixed = [f.name for f in fields if f.name not in moving]

    def flatten(value: T) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, n) for n in moving], tuple(getattr(value, n) for n in fixed)

    def unflatten(still: tuple[Any, ...], leaves: Sequence[Any]) -> T:
        value = object.__new__(made)  # not through __init__: traced numbers cannot be checked
        for name, content in zip([*moving, *fixed], [*leaves, *still], strict=True):
            object.__setattr__(value, name, content)
        return value

    jax.tree_util.register_pytree_node(made, flatten, unflatten)
    return made


@rule
class Wrapper(Guidance):
    """A rule that changes another one, `of`, in one respect and leaves the rest to it."""

    of: Guidance

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Those of the wrapped rule."""
        return self.of.streams

    @property
    def plain(self) -> int | None:
        """That of the wrapped rule."""
        return self.of.plain

    def ends(
        self, outputs: tuple[Float[Array, "b *d"], ...], dials: Dials
    ) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
        """Those of the wrapped rule."""
        return self.of.ends(outputs, dials)

    def combine(
        self,
        outputs: tuple[Float[Array, "b *d"], ...],
        query: Query,
        dials: Dials,
        memory: PyTree,
    ) -> tuple[Prediction, PyTree]:
        """The prediction of the wrapped rule."""
        return self.of.combine(outputs, query, dials, memory)

    def init(self, x: Float[Array, "b *d"]) -> PyTree:
        """That of the wrapped rule."""
        return self.of.init(x)

    def active(self, level: NoiseLevel, memory: PyTree) -> bool | Bool[Array, ""]:
        """As the wrapped rule."""
        return self.of.active(level, memory)

    def still(self, level: NoiseLevel) -> bool | Bool[Array, ""]:
        """As the wrapped rule."""
        return self.of.still(level)

    def phase(self, level: NoiseLevel) -> int | Int[Array, ""]:
        """As the wrapped rule."""
        return self.of.phase(level)

    def rest(self, cond: Float[Array, "b *d"], query: Query) -> Prediction:
        """As the wrapped rule."""
        return self.of.rest(cond, query)

    def cheapest(self, scales: Sequence[float]) -> Guidance:
        """The same change to the cheapest form of the wrapped rule."""
        return dataclasses.replace(self, of=self.of.cheapest(scales))

    def composed(self, prompts: int) -> Guidance:
        """The same change to the wrapped rule for so many prompts."""
        return dataclasses.replace(self, of=self.of.composed(prompts))


def innermost(rule: Guidance) -> Guidance:
    """The rule without what wraps it."""
    while isinstance(rule, Wrapper):
        rule = rule.of
    return rule


def check(name: str, value: Number, low: float, high: float) -> None:
    """InputError unless `value` lies between `low` and `high`."""
    if isinstance(value, int | float):
        in_range(f"guidance: {name}", value, low, high)


def extrapolate(
    start: Float[Array, "b *d"], end: Float[Array, "b *d"], w: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """start + w (end - start), the scale w per image."""
    return start + per_image(w, end) * (end - start)
