"""What `jaxdiff generate --help` says of a model's defaults, of samplers and of guidance rules."""

import argparse
import contextlib
import dataclasses
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdiff.checkpoints.embedded import EMBEDDED
from jaxdiff.core.errors import InputError

WIDTH = 80


def model_defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """The default options of the model that the arguments name; none of one that is not here."""
    from jaxdiff.checkpoints.models import read_model
    from jaxdiff.families.detection import family_of
    from jaxdiff.pipeline import defaults

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="?", type=pathlib.Path, default=EMBEDDED)
    parser.add_argument("--vae", nargs="?", type=pathlib.Path)
    parser.add_argument("--base", nargs="?", type=pathlib.Path)
    parser.add_argument("--text-encoders", nargs="*", type=pathlib.Path, default=[])
    given = parser.parse_known_args(list(arguments))[0]
    model, others = given.model, (given.vae, given.base, *given.text_encoders)
    if (
        model is not None
        and model.exists()
        and all(path is None or path.exists() for path in others)
    ):
        with contextlib.suppress(InputError):  # help is no place for errors
            parts = read_model(
                *(model, None),
                only=(),
                vae=given.vae,
                base=given.base,
                text_encoders=given.text_encoders,
            )
            found = defaults.model_defaults(parts, family_of(parts, model.name), model.name)
            return dataclasses.asdict(found)
    return {}


def print_choices() -> None:
    """Print a line for each sampler and each guidance rule."""
    from jaxdiff.guidance.base import RULES, WRAPPERS
    from jaxdiff.samplers import SAMPLERS

    print("\n--plan TOPOLOGY --model MODEL compiles for absent TPUs or GPUs; see --plan --help")
    print("\nsamplers (--sampler NAME or NAME:OPTION=VALUE,...):")
    print("\n".join(_lines(SAMPLERS)))
    print("\nguidance rules (--guidance NAME or NAME:OPTION=VALUE,...):")
    print("\n".join(_lines(RULES)))
    print("\nadded to a guidance rule with a plus, as in cfg+rescale:phi=0.7:")
    print("\n".join(_lines(WRAPPERS)))


def _lines(choices: Mapping[str, Any]) -> Iterator[str]:
    """The names of a registry with the first sentence of their documentation and their options."""
    width = max(map(len, choices)) + 4
    for name, choice in choices.items():
        cls = choice if isinstance(choice, type) else type(choice)
        text = " ".join((cls.__doc__ or "").partition("\n\n")[0].split())
        internal = getattr(choice, "internal", ())
        options = {f.name: f.default for f in dataclasses.fields(cls) if f.name not in internal}
        shown = ", ".join(f"{option}={default}" for option, default in options.items())
        text = f"{text} [{shown}]" if shown else text
        indent = " " * width
        yield textwrap.fill(
            text, WIDTH, initial_indent=f"  {name}".ljust(width), subsequent_indent=indent
        )
