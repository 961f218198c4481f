"""Stages: models or passes that follow one another: hires fixes, refiners, super-resolution.

Each goes on from the latents or the images of the one before. A list of them follows the model that
begins.
"""

import dataclasses
import pathlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np

from jaxdiff.checkpoints.timestep_grids import convention_of
from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.notation import IMAGES
from jaxdiff.core.validate import in_range
from jaxdiff.families.options import request_options
from jaxdiff.pipeline import image_inputs
from jaxdiff.pipeline.nonfinite import NonFiniteImageError
from jaxdiff.pipeline.output import Output
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.pipeline.request import Request, Requests
from jaxdiff.pipeline.request_metadata import plain_value

MAX_ENLARGEMENT = 8.0
STRENGTH = 0.7  # of the second pass of a hires fix
START = 0.8  # where a refiner takes over, as a fraction of the process
# What stages that enlarge images have from the call.
FROM_CALL = {
    *(f"{name}{number}" for name in ("prompt", "negative_prompt") for number in ("", "_2", "_3")),
    *("seed", "prompt_syntax"),
}


class Stage(ABC):
    """What goes on from what a model, or the stage before, has generated."""

    option: ClassVar[str]  # that asks for it, as errors name it
    takes_images: ClassVar[bool] = False  # of what comes before, not its latents
    takes_embeddings: ClassVar[bool] = False  # of images
    pipe: Pipeline  # the model that runs it

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Its entries in the settings of images; the entries of several stages are one list."""

    @property
    def own_options(self) -> set[str]:
        """Options of a call that its model reads, though the first may not."""
        return set()

    def with_options(self, options: Mapping[str, Any]) -> "Stage":
        """The stage with options of its own; InputError if it has none."""
        raise InputError(
            f"stage_options: got {', '.join(options)} for {self.option}, expected them in the call"
        )

    def before(self, requests: Sequence[Request]) -> Sequence[Request]:
        """`requests` as what comes before has to run them; InputError for a mask.

        A stage would not keep to it.
        """
        if any(request.mask is not None for request in requests):
            raise InputError(f"{self.option}: got it with a mask, expected images without one")
        return requests

    @abstractmethod
    def run(self, previous: Output, arguments: Mapping[str, Any], **settings: Any) -> Output:
        """Go on, for the `arguments` of a call, with `settings` of all its images.

        Raises InputError, and NonFiniteImageError.
        """


def output_for(pipe: Pipeline, stages: Sequence[Stage], output: str) -> str:
    """The form in which `pipe` gives its images to the first of `stages`, or, without any, a call.

    Of pixels the latents are the images, without the rounding of whole numbers.
    """
    if not stages:
        return output
    if stages[0].takes_embeddings or (stages[0].takes_images and pipe.family.latent_codec):
        return "numpy"
    return "latent"


def stage_settings(stages: Sequence[Stage]) -> dict[str, Any]:
    """The entries of all stages in the settings of images."""
    found: dict[str, Any] = {}
    for name, value in (item for stage in stages for item in stage.settings.items()):
        found[name] = [*found[name], *value] if isinstance(found.get(name), list) else value
    return found


def first_requests(stages: Sequence[Stage], requests: Sequence[Request]) -> Sequence[Request]:
    """The requests of the model that begins; InputError for some that a stage cannot serve."""
    for stage in reversed(stages):
        requests = stage.before(requests)
    return requests


def run_stages(
    stages: Sequence[Stage],
    first: Output,
    arguments: Mapping[str, Any],
    *,
    output: str,
    **settings: Any,
) -> Output:
    """What comes of the latents of a model, with the timings and the `failures` of all stages."""
    out = first
    for number, stage in enumerate(stages):
        kind = output_for(stage.pipe, stages[number + 1 :], output)
        try:
            found = stage.run(with_zeros(out), arguments, output=kind, **settings)
        except NonFiniteImageError as error:
            found = error.output
        timings = {name: out.timings[name] + seconds for name, seconds in found.timings.items()}
        failures = {**found.failures, **out.failures}
        out = dataclasses.replace(found, timings=timings, failures=failures)
    return out


def with_zeros(out: Output) -> Output:
    """`out` with zeros for images that are not finite, so that the others of a batch go on."""
    if not out.failures:
        return out
    images = np.array(out.images)
    images[list(out.failures)] = 0
    return dataclasses.replace(out, images=images)


@dataclasses.dataclass(frozen=True)
class HiresFix(Stage):
    """Enlarges latents `scale` times, 1 to MAX_ENLARGEMENT, and changes them with `strength`."""

    pipe: Pipeline
    scale: float
    strength: float = STRENGTH

    option = "hires_scale"

    def __post_init__(self) -> None:
        in_range("hires_scale", self.scale, 1, MAX_ENLARGEMENT)
        in_range("hires_strength", self.strength, 0, 1)

    @property
    def settings(self) -> dict[str, Any]:
        """Its entries in the settings of images."""
        return {"hires_scale": self.scale, "hires_strength": self.strength}

    def run(self, previous: Output, arguments: Mapping[str, Any], **settings: Any) -> Output:
        """Go on from latents; their requests have all that the call said."""
        del arguments
        factor = self.pipe.codec.config.downscale
        multiple = self.pipe.family.latent_multiple
        height, width = (
            round(self.scale * x / (factor * multiple)) * multiple
            for x in (previous.request.height, previous.request.width)
        )
        latents = image_inputs.enlarge(np.asarray(previous.images), height, width)
        requests = [
            dataclasses.replace(
                request,
                height=height * factor,
                width=width * factor,
                image=row,
                noise=None,
                strength=self.strength,
                denoising_start=None,
            )
            for request, row in zip(previous.requests, latents, strict=True)
        ]
        return self.pipe.generate(requests, **settings)


def unread_prompts(pipe: Pipeline) -> set[str]:
    """The options of prompts that no text encoder of a model reads."""
    numbers = {2, 3}.difference(pipe.family.prompt_numbers)
    return {f"{name}_{number}" for name in ("prompt", "negative_prompt") for number in numbers}


@dataclasses.dataclass(frozen=True)
class Refiner(Stage):
    """Another model that takes over at the fraction `start` of the process, 0 to 1.

    An ensemble of experts, as SDXL's base and refiner are (2307.01952, section 2.5). One with one
    text encoder reads `prompt` alone.
    """

    pipe: Pipeline
    start: float = START

    option = "refiner"

    def __post_init__(self) -> None:
        in_range("refiner_start", self.start, 0, 1)

    def check(self, base: Pipeline) -> None:
        """InputError unless it can go on with the latents of `base`."""
        channels = [pipe.codec.config.latent_channels for pipe in (base, self.pipe)]
        if channels[0] != channels[1]:
            raise InputError(
                f"refiner: got a model with {channels[1]} latent channels, expected "
                f"{channels[0]}, as the base model has"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Its entries in the settings of images."""
        name = f"{self.pipe.name} {self.pipe.fingerprint}"
        return {"refiner": name, "refiner_start": self.start}

    @property
    def own_options(self) -> set[str]:
        """Those of its family."""
        return set(self.pipe.family.options)

    def before(self, requests: Sequence[Request]) -> Sequence[Request]:
        """`requests` up to where it takes over; InputError for a mask."""
        own = super().before(requests)
        return [dataclasses.replace(each, denoising_end=self.start) for each in own]

    def run(self, previous: Output, arguments: Mapping[str, Any], **settings: Any) -> Output:
        """Go on from the latents of another model, with the options that this one reads."""
        left_out = {"image", "latents", "strength", *request_options()} - self.own_options
        left_out |= unread_prompts(self.pipe)
        shared = {name: value for name, value in arguments.items() if name not in left_out}
        if shared.get("steps") is None:
            shared["steps"] = previous.request.steps
        requests = self.pipe.resolve(**shared, image=previous.images, denoising_start=self.start)
        return self.pipe.generate(self._rescaled(requests, previous), **settings)

    def _rescaled(self, requests: Requests, previous: Output) -> Sequence[Request]:
        """`requests` with latents as their samplers take them: x, or x / alpha."""
        given, taken = (
            [convention_of(each.sampler).carries_x_over_alpha for each in of]
            for of in (previous.requests, requests)
        )
        if given == taken:
            return requests
        powers = np.subtract(given, taken, dtype=np.float32)
        scales = self.pipe.start_alpha(requests) ** powers
        return [
            dataclasses.replace(request, image=np.float32(scale) * request.image)
            for request, scale in zip(requests, scales, strict=True)
        ]


class ModelStage(Stage):
    """A model of its own, with `options` of requests of its own; others are those of the call."""

    options: Mapping[str, Any]

    option = "then"

    @property
    def settings(self) -> dict[str, Any]:
        """Its entries in the settings of images."""
        name = f"{self.pipe.name} {self.pipe.fingerprint}"
        own = {
            key: pathlib.Path(value) if key in IMAGES and isinstance(value, str) else value
            for key, value in self.options.items()
        }
        options = {key: plain_value(value) for key, value in own.items()}
        return {"then": [{"model": name, **options}]}

    def with_options(self, options: Mapping[str, Any]) -> "ModelStage":
        """The stage with these options of requests."""
        return dataclasses.replace(cast(Any, self), options={**self.options, **options})

    def before(self, requests: Sequence[Request]) -> Sequence[Request]:
        """`requests` as they are: a mask is kept to before this model has its turn."""
        return requests

    def check_options(self, reserved: Iterable[str], **given: Any) -> None:
        """InputError for options that are `reserved`, or that the model refuses beside `given`."""
        with prefix_errors(f"then: {self.pipe.name}"):
            for name in self.options.keys() & set(reserved):
                raise InputError(f"{name}: got it for one stage, expected it for the whole call")
            self.pipe.resolve("", **self.options, **given)

    def from_call(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The prompts and seeds among the `arguments` of a call, as far as the model reads them."""
        unread = unread_prompts(self.pipe)
        if not self.pipe.family.reads_prompt:
            unread |= {"prompt", "negative_prompt"}
        names = (FROM_CALL & arguments.keys()) - unread
        return {"prompt": "", **{name: arguments[name] for name in names}, **self.options}


@dataclasses.dataclass(frozen=True)
class SuperResolution(ModelStage):
    """A model that enlarges the images of the stage before, with `options` of requests of its own.

    It reads the same prompts, and has the same seeds.
    """

    pipe: Pipeline
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    takes_images = True

    def __post_init__(self) -> None:
        if not self.pipe.family.enlarges:
            raise InputError(
                f"then: got {self.pipe.name}, which is {self.pipe.family.name}, expected a model "
                "that enlarges images"
            )
        self.check_options({*FROM_CALL, "image"})

    def run(self, previous: Output, arguments: Mapping[str, Any], **settings: Any) -> Output:
        """Go on from images, with the prompts and seeds of the call."""
        requests = self.pipe.resolve(**self.from_call(arguments), image=previous.images)
        return self.pipe.generate(requests, **settings)
