"""Two passes: hires fix, or base model and refiner."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff.checkpoints.timestep_grids import convention_of
from jaxdiff.core.aliases import rename_arguments
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range
from jaxdiff.families.options import request_options
from jaxdiff.pipeline import image_inputs
from jaxdiff.pipeline.output import Output, Settings
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.pipeline.request import Request, Requests

MAX_ENLARGEMENT = 8.0
STRENGTH = 0.7  # of the second pass of a hires fix
START = 0.8  # where a refiner takes over, as a fraction of the process
_SETTINGS = Settings.__dataclass_fields__.keys() - {"output"}


@rename_arguments
def hires_fix(
    pipe: Pipeline,
    *arguments: Any,
    scale: float = 2.0,
    hires_strength: float = STRENGTH,
    output: str = "pil",
    **options: Any,
) -> Output:
    """Generate at the given size, upscale the latents by `scale`, refine with `hires_strength`.

    Models compose images best at the size that they were trained at. The other arguments are those
    of calling `pipe`. Sizes are rounded to what the model can generate. Raises InputError.
    """
    in_range("hires_scale", scale, 1, MAX_ENLARGEMENT)
    in_range("hires_strength", hires_strength, 0, 1)
    settings = {name: options.pop(name) for name in _SETTINGS & options.keys()}
    requests = pipe.resolve(*arguments, **options)
    check_unmasked("hires_scale", requests)
    first = pipe.generate(requests, output="latent", **settings)
    return enlarged(pipe, first, scale=scale, strength=hires_strength, output=output, **settings)


def check_unmasked(name: str, requests: Sequence[Request]) -> None:
    """InputError if any of `requests` has a mask, which a second pass would not keep to."""
    if any(request.mask is not None for request in requests):
        raise InputError(f"{name}: got it with a mask, expected images without one")


def enlarged(
    pipe: Pipeline, first: Output, *, scale: float, strength: float, **settings: Any
) -> Output:
    """The second pass of a hires fix, over latents; `settings` are those of `generate`."""
    factor, multiple = pipe.codec.config.downscale, pipe.family.latent_multiple
    height, width = (
        round(scale * x / (factor * multiple)) * multiple
        for x in (first.request.height, first.request.width)
    )
    latents = image_inputs.enlarge(np.asarray(first.images), height, width)
    requests = [
        dataclasses.replace(
            request,
            height=height * factor,
            width=width * factor,
            image=row,
            noise=None,
            strength=strength,
            denoising_start=None,
        )
        for request, row in zip(first.requests, latents, strict=True)
    ]
    return _together(first, pipe.generate(requests, **settings))


def refine(
    base: Pipeline,
    refiner: Pipeline,
    *arguments: Any,
    start: float = START,
    output: str = "pil",
    **options: Any,
) -> Output:
    """Run `base` for the fraction `start` of the denoising process, and `refiner` for the rest.

    An ensemble of experts, as SDXL's base and refiner are (2307.01952, section 2.5). The other
    arguments are those of calling `base`; a refiner with one text encoder reads `prompt` alone.
    Raises InputError.
    """
    check_refiner(base, refiner, start)
    own = _read_by(base, options)
    settings = {name: own.pop(name) for name in _SETTINGS & own.keys()}
    requests = base.resolve(*arguments, denoising_end=start, **own)
    check_unmasked("refiner", requests)
    first = base.generate(requests, output="latent", **settings)
    return refined(refiner, first, *arguments, start=start, output=output, **options)


def check_refiner(base: Pipeline, refiner: Pipeline, start: float) -> None:
    """InputError unless `refiner` can go on with the latents of `base` after `start`."""
    in_range("refiner_start", start, 0, 1)
    channels = [pipe.codec.config.latent_channels for pipe in (base, refiner)]
    if channels[0] != channels[1]:
        raise InputError(
            f"refiner: got a model with {channels[1]} latent channels, expected {channels[0]}, as "
            "the base model has"
        )


def refined(
    refiner: Pipeline,
    first: Output,
    *arguments: Any,
    start: float,
    output: str = "pil",
    **options: Any,
) -> Output:
    """The second pass of `refine`, over the latents of the first; arguments as there."""
    shared = {
        name: value
        for name, value in _read_by(refiner, options).items()
        if name not in ("image", "latents", "strength")
    }
    for number in {2, 3}.difference(refiner.family.prompt_numbers):
        for name in (f"prompt_{number}", f"negative_prompt_{number}"):
            shared.pop(name, None)
    if shared.get("steps") is None:
        shared["steps"] = first.request.steps
    settings = {name: shared.pop(name) for name in _SETTINGS & shared.keys()}
    requests = refiner.resolve(*arguments, **shared, image=first.images, denoising_start=start)
    second = refiner.generate(_taking_over(refiner, requests, first), output=output, **settings)
    return _together(first, second)


def _taking_over(refiner: Pipeline, requests: Requests, first: Output) -> Sequence[Request]:
    """`requests` with latents of `first` as their samplers take them: x, or x / alpha."""
    given, taken = (
        [convention_of(each.sampler).carries_x_over_alpha for each in of]
        for of in (first.requests, requests)
    )
    if given == taken:
        return requests
    powers = np.subtract(given, taken, dtype=np.float32)
    scales = refiner.start_alpha(requests) ** powers
    return [
        dataclasses.replace(request, image=np.float32(scale) * request.image)
        for request, scale in zip(requests, scales, strict=True)
    ]


def _read_by(pipe: Pipeline, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` without those that only another family reads."""
    others = request_options().keys() - pipe.family.options
    return {name: value for name, value in options.items() if name not in others}


def _together(first: Output, second: Output) -> Output:
    """The second pass with the timings of both."""
    timings = {name: first.timings[name] + seconds for name, seconds in second.timings.items()}
    return dataclasses.replace(second, timings=timings)
