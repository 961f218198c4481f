"""Stages: models or passes that follow one another, such as a hires fix or a refiner.

Each goes on from the latents of the one before. A list of them follows the model that begins.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxdiff.checkpoints.timestep_grids import convention_of
from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range
from jaxdiff.families.options import request_options
from jaxdiff.pipeline import image_inputs
from jaxdiff.pipeline.nonfinite import NonFiniteImageError
from jaxdiff.pipeline.output import Output, Settings
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.pipeline.request import Request, Requests

MAX_ENLARGEMENT = 8.0
STRENGTH = 0.7  # of the second pass of a hires fix
START = 0.8  # where a refiner takes over, as a fraction of the process
_SETTINGS = Settings.__dataclass_fields__.keys() - {"output"}


class Stage(ABC):
    """What goes on from the latents that a model, or the stage before, has generated."""

    option: ClassVar[str]  # that asks for it, as errors name it
    pipe: Pipeline  # the model that runs it

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Its entries in the settings of images."""

    def before(self, requests: Sequence[Request]) -> Sequence[Request]:
        """`requests` as what comes before has to run them; InputError for a mask.

        A stage would not keep to it.
        """
        if any(request.mask is not None for request in requests):
            raise InputError(f"{self.option}: got it with a mask, expected images without one")
        return requests

    @abstractmethod
    def run(self, previous: Output, arguments: Mapping[str, Any], **settings: Any) -> Output:
        """Go on from latents, for the `arguments` of a call, with `settings` of all its images.

        Raises InputError, and NonFiniteImageError.
        """


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
        kind = output if number == len(stages) - 1 else "latent"
        try:
            found = stage.run(out, arguments, output=kind, **settings)
        except NonFiniteImageError as error:
            found = error.output
        timings = {name: out.timings[name] + seconds for name, seconds in found.timings.items()}
        failures = {**found.failures, **out.failures}
        out = dataclasses.replace(found, timings=timings, failures=failures)
    return out


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

    def before(self, requests: Sequence[Request]) -> Sequence[Request]:
        """`requests` up to where it takes over; InputError for a mask."""
        own = super().before(requests)
        return [dataclasses.replace(each, denoising_end=self.start) for each in own]

    def run(self, previous: Output, arguments: Mapping[str, Any], **settings: Any) -> Output:
        """Go on from the latents of another model, with the options that this one reads."""
        family = self.pipe.family
        left_out = {"image", "latents", "strength", *request_options()} - family.options.keys()
        for number in {2, 3}.difference(family.prompt_numbers):
            left_out |= {f"prompt_{number}", f"negative_prompt_{number}"}
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


@rename_arguments
def hires_fix(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    *,
    scale: float = 2.0,
    hires_strength: float = STRENGTH,
    output: str = "pil",
    **options: Any,
) -> Output:
    """Generate at the given size, upscale the latents by `scale`, refine with `hires_strength`.

    Models compose images best at the size that they were trained at. The other arguments are those
    of calling `pipe`. Sizes are rounded to what the model can generate. Raises InputError.
    """
    stage = HiresFix(pipe, scale, hires_strength)
    return _generate(pipe, stage, {"prompt": prompt, **options}, output)


def refine(
    base: Pipeline,
    refiner: Pipeline,
    prompt: str | Sequence[str],
    *,
    start: float = START,
    output: str = "pil",
    **options: Any,
) -> Output:
    """Run `base` for the fraction `start` of the denoising process, and `refiner` for the rest.

    The other arguments are those of calling `base`; see Refiner. Raises InputError.
    """
    stage = Refiner(refiner, start)
    stage.check(base)
    return _generate(base, stage, {"prompt": prompt, **options}, output)


def _generate(pipe: Pipeline, stage: Stage, options: Mapping[str, Any], output: str) -> Output:
    """What a call of `pipe` with such options, and then `stage`, generate."""
    settings = {name: options[name] for name in _SETTINGS & options.keys()}
    arguments = {name: value for name, value in options.items() if name not in settings}
    others = stage.pipe.family.options.keys() - pipe.family.options
    own = {name: value for name, value in arguments.items() if name not in others}
    requests = first_requests([stage], pipe.resolve(**own))
    first = pipe.generate(requests, output="latent", **settings)
    out = run_stages([stage], first, arguments, output=output, **settings)
    if out.failures:
        raise NonFiniteImageError(out)
    return out
