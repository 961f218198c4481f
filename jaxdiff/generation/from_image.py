"""The options of `generate` that made an image, from the settings in its file."""

import dataclasses
import pathlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from jaxdiff.core.errors import InputError
from jaxdiff.generation.image_files import read_settings

T = TypeVar("T")
# Settings that name files: a name and a digest do not say where those are.
FILES: Mapping[str, str] = {
    "model": "--model",
    "vae": "--vae",  # before weights, of which it is a part
    "base": "--base",
    "text_encoders": "--text-encoders",
    "weights": "--model and --dtype",
    "guidance_model": "--guidance-model",
    "loras": "--lora",
    "textual_inversions": "--textual-inversion",
    "classifier": "--classifier",
    "clip": "--clip",
    "refiner": "--refiner",
    "then": "--then",
    "image": "--image",
    "original_image": "--original-image",
    "mask": "--mask",
}

# Settings that are left out where they are these, though a model's default may be another.
LEFT_OUT: Mapping[str, Any] = {"guidance": "cfg"}


def typed_options(arguments: Sequence[str]) -> set[str]:
    """The names of the options among the arguments of a command, as fields."""
    options = (each.partition("=")[0] for each in arguments if each.startswith("--"))
    return {name.removeprefix("--").removeprefix("no-").replace("-", "_") for name in options}


def with_settings(
    options: T, path: pathlib.Path, typed: Collection[str]
) -> tuple[T, dict[str, Any]]:
    """`options`, a dataclass, with the settings in `path` where they are not `typed`; and these.

    Raises InputError for a file without settings.
    """
    stored = read_settings(path)
    if not path.is_file():
        raise InputError(f"from: got {path} (no such file), expected an image file")
    if stored is None:
        raise InputError(f"from: got {path}, expected an image that jaxdiff generate wrote")
    fields = {field.name for field in dataclasses.fields(options)}  # pyright: ignore
    every, wanted = {**LEFT_OUT, **stored}, fields - {*typed, *FILES}
    own = {name: value for name, value in every.items() if name in wanted}
    model = getattr(options, "model", None)
    if "prediction_type" in own and pathlib.Path(model or "").resolve().name != stored["model"]:
        warnings.warn(
            f"from: got an image of the model {stored['model']}, whose prediction_type "
            f"{own.pop('prediction_type')} does not count for {model}",
            stacklevel=2,
        )
    if "prompt" in own:
        own["prompt"] = (own["prompt"],)
    return dataclasses.replace(options, **own), stored  # pyright: ignore


def check_restored(
    stored: Mapping[str, Any], settings: Mapping[str, Any], typed: Collection[str]
) -> None:
    """InputError for a file or network that is another one than `stored`, but was not `typed`.

    All other settings are those that `with_settings` has filled in.
    """
    options = {
        "loras": ("lora",),
        "textual_inversions": ("textual_inversion",),
        "weights": ("model", "vae", "base", "text_encoders"),
    }
    others = [
        f"{name} {stored.get(name)!r:.60}, now {settings.get(name)!r:.60} ({wanted})"
        for name, wanted in FILES.items()
        if stored.get(name) != settings.get(name) and not {name, *options.get(name, ())} & {*typed}
    ]
    if others:
        raise InputError(f"from: got an image with {'; '.join(others)}, expected those options")
