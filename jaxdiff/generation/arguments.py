"""The arguments of a pipeline's call for images of prompt files and command lines."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxdiff.generation.prompt_spec import IMAGES, PromptSpec

PER_IMAGE = (  # lists in a call
    "negative_prompt",
    "prompt_2",
    "negative_prompt_2",
    "prompt_3",
    "negative_prompt_3",
)
NUMBERS = ("guidance_scale", "steps", "strength")  # lists too, unless an image has none
# Options of a line that a call has once, or as a list where the lines differ.
OPTIONS = (
    *("guidance", "negative_scale", "classifier_scale", "clip_scale", "sampler"),
    *("timestep_spacing", "eta", "clip_skip", "height", "width", "prompt_syntax"),
    "max_sequence_length",
)


@runtime_checkable
class SeededSpec(Protocol):
    """The options of an image, those of its line with the defaults, and its seed."""

    @property
    def spec(self) -> PromptSpec:
        """What its line says; None means the model's default."""
        ...

    @property
    def seed(self) -> int:
        """Its seed."""
        ...


def call_arguments(images: Sequence[SeededSpec], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for images that can share a call; `options` are those of all lines."""
    specs = [image.spec for image in images]
    numbers = {name: [getattr(spec, name) for spec in specs] for name in NUMBERS}
    files = {
        name: paths
        for name in IMAGES
        if None not in (paths := [getattr(spec, name) for spec in specs])
    }
    columns = {name: [getattr(spec, name) for spec in specs] for name in OPTIONS}
    own = {
        name: column[0] if all(value == column[0] for value in column) else column
        for name, column in columns.items()
        if any(value is not None for value in column)
    }
    names = {name for spec in specs for name in spec.options}
    return {
        **files,
        **options,
        **own,
        **{name: [spec.options.get(name) for spec in specs] for name in names},
        "prompt": [spec.prompt for spec in specs],
        **{name: [getattr(spec, name) for spec in specs] for name in PER_IMAGE},
        **{name: None if None in column else column for name, column in numbers.items()},
        "seed": [image.seed for image in images],
    }


def line_options(spec: PromptSpec) -> dict[str, Any]:
    """What a line says of its images, but for files."""
    names = ("prompt", *PER_IMAGE, *NUMBERS)
    given = {name: value for name in OPTIONS if (value := getattr(spec, name)) is not None}
    return {**spec.options, **given, **{name: getattr(spec, name) for name in names}}
