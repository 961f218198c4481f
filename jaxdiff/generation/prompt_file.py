"""Prompt files, and one `ImageJob` for each image that a command line or a file asks for."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.generation.prompt_spec import IMAGES as IMAGES
from jaxdiff.generation.prompt_spec import PromptSpec, image_name, image_seeds, with_defaults
from jaxdiff.generation.prompt_spec import slug as slug
from jaxdiff.generation.prompt_stream import BadLine, read_prompts

Line = tuple[str, PromptSpec]  # FILE:LINE ("" for the command line), and the prompt there


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageJob:
    """One image; None in its `spec` means the model's default."""

    name: str  # of the file, without suffix
    former_name: str | None = None  # that earlier versions gave it
    source: str  # FILE:LINE
    spec: PromptSpec
    seed: int


def read_prompt_file(path: str | pathlib.Path) -> list[Line]:
    """The prompts of a file, as `read_prompts` reads them; the first bad line is an InputError."""
    lines: list[Line] = []
    for line in read_prompts(path):
        if isinstance(line, BadLine):
            raise InputError(line.reason)
        lines.append((line.source, line.spec))
    if not lines:
        raise InputError(f"prompts: got no prompt in {path}, expected at least one")
    return lines


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
