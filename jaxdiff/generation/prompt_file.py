"""Prompt files, and one `ImageJob` for each image that a command line or a file asks for."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.core.configs import from_mapping, prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.text import decode_text
from jaxdiff.core.validate import one_of
from jaxdiff.generation.prompt_spec import IMAGES as IMAGES
from jaxdiff.generation.prompt_spec import PromptSpec, image_name, image_seeds, with_defaults
from jaxdiff.generation.prompt_spec import slug as slug

JSON_LINES = (".jsonl", ".ndjson")
# Of files whose lines are no prompts.
OTHER_SUFFIXES = (".csv", ".tsv", ".json", ".parquet", ".xlsx", ".yaml", ".yml")


# Fields of a line that `read_prompt_file` reads.
FIELDS = (
    *("prompt", "prompt_2", "prompt_3"),
    *("negative_prompt", "negative_prompt_2", "negative_prompt_3"),
    *("guidance_scale", "steps", "strength", "seed", "num_images", *IMAGES),
)
Line = tuple[str, PromptSpec]  # FILE:LINE ("" for the command line), and the prompt there


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageJob:
    """One image; None in its `spec` means the model's default."""

    name: str  # of the file, without suffix
    former_name: str | None = None  # that earlier versions gave it
    source: str  # FILE:LINE
    spec: PromptSpec
    seed: int


def read_prompt_file(path: pathlib.Path) -> list[Line]:
    """The prompts of a file: JSON lines (`{"prompt": ..., "seed": ...}`) or one prompt a line.

    Empty lines are skipped. Raises InputError with the line's number.
    """
    if path.suffix.lower() in OTHER_SUFFIXES:
        raise InputError(
            f"prompts: got {path}, expected a .jsonl file with an object a line, or a .txt file "
            "with a prompt a line"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"prompts: got {path} ({error.strerror}), expected a text file") from None
    lines: list[Line] = []
    for number, line in enumerate(decode_text(data, f"prompts: {path}").split("\n"), 1):
        source, text = f"{path}:{number}", line.strip()
        if text and path.suffix.lower() in JSON_LINES:
            lines.append((source, _json_line(text, source, path.parent)))
        elif text:
            lines.append((source, PromptSpec(prompt=text)))
    if not lines:
        raise InputError(f"prompts: got no prompt in {path}, expected at least one")
    if path.suffix.lower() not in JSON_LINES and all(s.prompt.startswith('{"') for _, s in lines):
        raise InputError(f"prompts: got objects in {path}, expected them in a .jsonl file")
    return lines


def _json_line(line: str, source: str, folder: pathlib.Path) -> PromptSpec:
    values = parse_object(line.encode(), source)
    options = {}
    for name in values.keys() - FIELDS:
        from jaxdiff.families.options import request_options  # only now: it waits for jax

        options[one_of(f"{source}: field", name, [*FIELDS, *request_options()])] = values[name]
    own = {name: value for name, value in values.items() if name in FIELDS}
    spec = dataclasses.replace(from_mapping(PromptSpec, own, source=source), options=options)
    files = {name: getattr(spec, name) for name in IMAGES}
    paths = {name: str(folder / file) for name, file in files.items() if file is not None}
    return dataclasses.replace(spec, **paths)


def make_jobs(lines: Sequence[Line], defaults: PromptSpec, *, numbered: bool) -> list[ImageJob]:
    """The jobs of `expand_jobs`, each once; InputError for a default that no line can use."""
    jobs = list(expand_jobs(lines, defaults, numbered=numbered))
    for name in ("mask", "strength"):
        value = getattr(defaults, name)
        if value is not None and all(job.spec.image is None for job in jobs):
            raise InputError(f"{name}: got {value} without an image, expected --image too")
    once: list[ImageJob] = []
    by_name: dict[str, list[ImageJob]] = {}
    for job in jobs:
        alike = by_name.setdefault(job.name, [])
        if job not in alike:
            alike.append(job)
            once.append(job)
    return once


def expand_jobs(
    lines: Sequence[Line], defaults: PromptSpec, *, numbered: bool
) -> Iterator[ImageJob]:
    """One job per image; image j of a prompt has seed `seed + j`.

    `defaults` has what a line leaves out. `numbered` names files by the line's position too (a
    prompt file), not by the words of the prompt alone.
    """
    for index, (source, line) in enumerate(lines):
        spec = with_defaults(line, defaults)
        with prefix_errors(source):
            seeds = image_seeds(spec)
        for seed in seeds:
            name = image_name(index, line.prompt, seed)
            yield ImageJob(
                name=name if numbered else f"{slug(line.prompt)}_{seed}",
                former_name=f"{index:06d}_{seed}" if numbered else None,
                source=source,
                spec=spec,
                seed=seed,
            )
