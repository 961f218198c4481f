"""What is to be drawn: one `Job` per picture, from arguments or from a file of prompts."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.core.configs import from_mapping
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One picture; `name` is its file name without suffix, None means the model's default."""

    name: str
    prompt: str
    negative_prompt: str | None
    guidance_scale: float | None
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLine:
    """One line of a prompt file; what it leaves out comes from the command line."""

    prompt: str
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    num_images: int | None = None


def slug(prompt: str) -> str:
    """`prompt` as the beginning of a file name: lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80] or "image"


def read_lines(path: pathlib.Path) -> list[PromptLine]:
    """The prompts of a file: JSON lines (`{"prompt": ..., "seed": ...}`) or one prompt a line.

    Empty lines are skipped. Raises InputError with the line's number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"prompts: got {path} ({error.strerror}), expected a text file") from None
    except UnicodeDecodeError:
        raise InputError(f"prompts: got {path} (not UTF-8), expected a text file") from None
    read = _json_line if path.suffix == ".jsonl" else _plain_line
    lines = [
        read(line.strip(), f"{path}:{number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise InputError(f"prompts: got no line in {path}, expected at least one prompt")
    return lines


def _plain_line(line: str, source: str) -> PromptLine:
    del source
    return PromptLine(prompt=line)


def _json_line(line: str, source: str) -> PromptLine:
    return from_mapping(PromptLine, parse_object(line.encode(), source), source=source)


def expand(
    lines: Sequence[PromptLine], *, numbered: bool, seed: int, num_images: int, **common: Any
) -> Iterator[Job]:
    """One job per picture: image j of a prompt has seed `seed + j`, wherever the prompt stands.

    `numbered` names files by the line's position (a batch job) instead of by the prompt's words.
    """
    for index, line in enumerate(lines):
        first = line.seed if line.seed is not None else seed
        count = line.num_images if line.num_images is not None else num_images
        in_range("num_images", count, 1, 1_000_000)
        for own in range(first, first + count):
            in_range("seed", own, 0, 2**32 - 1)
            head = f"{index:06d}" if numbered else slug(line.prompt)
            yield Job(
                name=f"{head}_{own}",
                prompt=line.prompt,
                negative_prompt=_first(line.negative_prompt, common["negative_prompt"]),
                guidance_scale=_first(line.guidance_scale, common["guidance_scale"]),
                seed=own,
            )


def _first(own: Any, common: Any) -> Any:
    return own if own is not None else common
