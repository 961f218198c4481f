"""The interface of guidance rules: streams, inputs, state, and how rules are composed.

A rule sees the raw outputs of its streams, since some rules are defined in that space, and gives
one prediction; so it may convert first and combine denoised images, and it may return a
`Prediction` whose noise belongs to another stream than its image. Rules are frozen dataclasses and
pytrees: their numbers can be traced, so that another value compiles nothing.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax.numpy as jnp

from jaxdiff.core.aliases import rename_guidance
from jaxdiff.core.errors import InputError
from jaxdiff.core.notation import split_options, with_options
from jaxdiff.core.types import Array, Float, Int, PyTree
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.denoising import NoiseLevel, Prediction, per_image, predict, target
from jaxdiff.guidance.simplification import check_simplify

if TYPE_CHECKING:
    from jaxdiff.guidance.wrapper import Wrapper

Number = float | Float[Array, ""]
Outputs = tuple[Float[Array, "b *d"], ...]  # raw, of the streams

MAX_SCALE = 1000.0
SKIP, CONDITIONAL, GUIDED = 0, 1, 2  # modes of a rule, by cost


class Stream(NamedTuple):
    """One network evaluation of each image: with which prompt, network and attention."""

    # "prompt"; "null"; "negative": the negative prompt, or null without one
    prompt_source: str = "prompt"
    prompt_index: int = 0  # which of several prompts of one image
    network: str = "main"  # "main", or "guidance_model" for a second, weaker one
    perturbed: bool = False  # with self-attention switched off in the middle of the network


class GuidanceScales(NamedTuple):
    """The guidance scales of each image."""

    scale: Float[Array, "b"]  # w
    negative: Float[Array, "b"] | None = None  # the weight of a negative stream of its own
    weights: Float[Array, "b n"] | None = None  # of several prompts; None: 1 each


class DenoiserInput(NamedTuple):
    """The network's input: noisy images, their noise level, and its prediction type."""

    x: Float[Array, "b *d"]
    level: NoiseLevel
    prediction_type: str

    def predict(
        self, output: Float[Array, "b *d"], prediction_type: str | None = None
    ) -> Prediction:
        """The denoised image and the noise of `output`, of type `prediction_type`."""
        kind = prediction_type or self.prediction_type
        return predict(kind, output, self.x, self.level.alpha, self.level.sigma)

    def output(self, prediction: Prediction) -> Float[Array, "b *d"]:
        """The network output that stands for `prediction`: the inverse of `predict`."""
        x0, eps = prediction
        return target(self.prediction_type, x0, eps, self.level.alpha, self.level.sigma)

    def denoised(self, D: Float[Array, "b *d"]) -> Prediction:
        """The image D with the noise that belongs to it."""
        return self.predict(D, "sample")


class Capabilities(NamedTuple):
    """What a rule works with; how many prompts of an image, `Guidance.for_prompts` says."""

    max_scale: float = MAX_SCALE  # the largest guidance scale; the smallest is 0
    negative_scale: bool = False  # whether it reads `GuidanceScales.negative`
    # whether its noise is not that of its image: only for samplers that renoise along it
    separate_eps: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """A guidance rule."""

    internal: ClassVar[tuple[str, ...]] = ()  # fields that requests set, not users

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_simplify(cls, Guidance)

    @property
    def capabilities(self) -> Capabilities:
        """What it works with."""
        return Capabilities()

    @property
    @abstractmethod
    def streams(self) -> tuple[Stream, ...]:
        """The K streams; `combine` gets their outputs in this order."""

    @property
    def reads_negative_prompt(self) -> bool:
        """Whether one of the streams gets the negative prompt."""
        return any(stream.prompt_source == "negative" for stream in self.streams)

    @property
    @abstractmethod
    def cond_stream(self) -> int | None:
        """The index of the conditional stream; None if several prompts make it."""

    @abstractmethod
    def combine(
        self, outputs: Outputs, inputs: DenoiserInput, scales: GuidanceScales, state: PyTree
    ) -> tuple[Prediction, PyTree]:
        """One prediction from the outputs of the streams, and the new state."""

    def uncond_and_cond(
        self, outputs: Outputs, scales: GuidanceScales
    ) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
        """The raw outputs of the unconditional and of the conditional model.

        The first and the conditional stream, unless a rule makes them from several.
        """
        del scales
        return outputs[0], outputs[self.cond_stream or 0]

    def init_state(self, x: Float[Array, "b *d"]) -> PyTree:
        """The guidance state before the first step, with leaves (b, ...)."""
        del x
        return ()

    def mode(self, level: NoiseLevel, state: PyTree) -> int | Int[Array, "b"]:
        """How each image gets its prediction at this level: SKIP, CONDITIONAL or GUIDED.

        SKIP: the velocity eps - D is 0, x stays, and the network is not called. CONDITIONAL:
        `unguided` gets the conditional stream, and the state stays. What a whole batch does not
        need is not evaluated.
        """
        del level, state
        return GUIDED

    def phase(self, level: NoiseLevel) -> int | Int[Array, "b"]:
        """A number for the formula in force here; where it changes, samplers drop their history."""
        del level
        return 0

    def unguided(self, cond: Float[Array, "b *d"], inputs: DenoiserInput) -> Prediction:
        """The prediction where the rule does not guide, from the conditional output."""
        return inputs.predict(cond)

    def skipped(self, inputs: DenoiserInput) -> Prediction:
        """The prediction where no network is called: the velocity eps - D is 0."""
        return inputs.predict(jnp.zeros_like(inputs.x), "flow_prediction")

    def simplify(self, scales: Sequence[float]) -> "Guidance":
        """The rule with the fewest streams that predicts the same for images with these scales.

        It belongs to one `combine`: by default all streams stay.
        """
        del scales
        return self

    def for_prompts(self, num_prompts: int) -> "Guidance":
        """The rule for images with `num_prompts` prompts each; InputError if there is none."""
        if num_prompts == 1:
            return self
        raise InputError(
            f"prompt: got {num_prompts} prompts joined by AND, expected 1 with this guidance rule"
        )


# By name. The package's __init__ lists them, so any import of this module fills the tables.
RULES: dict[str, Guidance] = {}
WRAPPERS: dict[str, "type[Wrapper]"] = {}


def parse(text: str) -> Guidance:
    """The rule that a text such as "apg:eta=0.2,norm_threshold=15+interval" describes.

    First a rule, then its wrappers from the inside out, each with options. Raises InputError.
    """
    first, *others = rename_guidance(text).split("+")
    name, options = split_options("guidance", first)
    rule = with_options("guidance", name, RULES[one_of("guidance", name, RULES)], options)
    for part in others:
        wrapper, options = split_options("guidance", part)
        wrapped = WRAPPERS[one_of("guidance", wrapper, WRAPPERS)](inner=rule)
        if rule.capabilities.separate_eps and not wrapped.keeps_separate_eps:
            fitting = [key for key, each in WRAPPERS.items() if each.keeps_separate_eps]
            raise InputError(
                f"guidance: got wrapper {wrapper} for {name}, expected {' or '.join(fitting)}"
            )
        rule = with_options("guidance", wrapper, wrapped, options)
    return rule


def is_unguided(text: str) -> bool:
    """Whether the rule that `text` describes is "none", with wrappers or without."""
    return text.partition("+")[0] == "none"


def check(name: str, value: Number, low: float, high: float) -> None:
    """InputError unless `value` lies between `low` and `high`."""
    if isinstance(value, int | float):
        in_range(f"guidance: {name}", value, low, high)


def extrapolate(
    start: Float[Array, "b *d"], end: Float[Array, "b *d"], w: Float[Array, "b"]
) -> Float[Array, "b *d"]:
    """start + w (end - start), the scale w per image."""
    return start + per_image(w, end) * (end - start)
