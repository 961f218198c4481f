"""Prompt files, and one `ImageJob` for each image that a command line or a file asks for."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.core.configs import from_mapping, prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.text import decode_text
from jaxdiff.core.validate import in_range, one_of

IMAGES = ("image", "original_image", "mask")  # fields that are files
JSON_LINES = (".jsonl", ".ndjson")
# Of files whose lines are no prompts.
OTHER_SUFFIXES = (".csv", ".tsv", ".json", ".parquet", ".xlsx", ".yaml", ".yml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """One line of a prompt file; fields that it leaves out come from the command line."""

    prompt: str
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    prompt_3: str | None = None
    negative_prompt_3: str | None = None
    guidance_scale: float | None = None
    steps: int | None = None
    image: str | None = None  # a file, relative to the prompt file's folder
    original_image: str | None = None  # what changes where `image` is one to enlarge
    mask: str | None = None
    strength: float | None = None
    seed: int | None = None
    num_images: int | None = None
    # options that the model's family reads; in a file they stand beside the others
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Line = tuple[str, PromptSpec]  # FILE:LINE ("" for the command line), and the prompt there


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageJob:
    """One image; None in its `spec` means the model's default."""

    name: str  # of the file, without suffix
    former_name: str | None = None  # that earlier versions gave it
    source: str  # FILE:LINE
    spec: PromptSpec
    seed: int


def slug(prompt: str) -> str:
    """`prompt` as the start of a file name: lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80] or "image"


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
    fields = [f.name for f in dataclasses.fields(PromptSpec) if f.name != "options"]
    options = {}
    for name in values.keys() - fields:
        from jaxdiff.families.options import request_options  # only now: it waits for jax

        options[one_of(f"{source}: field", name, [*fields, *request_options()])] = values[name]
    own = {name: value for name, value in values.items() if name in fields}
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
        spec = _with_defaults(line, defaults)
        number, words = f"{index:06d}", slug(line.prompt)
        with prefix_errors(source):
            seeds = _seeds(spec.seed or 0, 1 if spec.num_images is None else spec.num_images)
        for seed in seeds:
            yield ImageJob(
                name=f"{number}_{words}_{seed}" if numbered else f"{words}_{seed}",
                former_name=f"{number}_{seed}" if numbered else None,
                source=source,
                spec=spec,
                seed=seed,
            )


def _with_defaults(line: PromptSpec, defaults: PromptSpec) -> PromptSpec:
    """`line` with the defaults; those of mask and strength apply only to lines with an image."""
    own = {k: v for k, v in dataclasses.asdict(line).items() if v is not None}
    options = {k: v for k, v in line.options.items() if v is not None}
    filled = dataclasses.replace(defaults, **own | {"options": {**defaults.options, **options}})
    if filled.image is None:
        return dataclasses.replace(filled, mask=line.mask, strength=line.strength)
    return filled


def _seeds(first: int, count: int) -> range:
    in_range("num_images", count, 1, 1_000_000)
    in_range("seed", first, 0, 2**32 - 1)
    in_range("seed", first + count - 1, 0, 2**32 - 1)
    return range(first, first + count)
