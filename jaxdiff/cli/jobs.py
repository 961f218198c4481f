"""What is to be drawn: one `Job` per picture, from arguments or from a file of prompts."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence

from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.core.configs import from_mapping, prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLine:
    """One line of a prompt file; what it leaves out comes from the command line."""

    prompt: str
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    guidance_scale: float | None = None
    image: str | None = None  # a file, relative to the prompt file's folder
    mask: str | None = None
    strength: float | None = None
    seed: int | None = None
    num_images: int | None = None


Line = tuple[str, PromptLine]  # FILE:LINE, "" on the command line, and what is said there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One picture; None in what it `asks` means the model's default."""

    name: str  # of the file, without suffix
    source: str  # FILE:LINE
    asks: PromptLine
    seed: int


def slug(prompt: str) -> str:
    """`prompt` as the beginning of a file name: lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80] or "image"


def read_lines(path: pathlib.Path) -> list[Line]:
    """The prompts of a file: JSON lines (`{"prompt": ..., "seed": ...}`) or one prompt a line.

    Empty lines are skipped. Raises InputError with the line's number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"prompts: got {path} ({error.strerror}), expected a text file") from None
    except UnicodeDecodeError:
        raise InputError(f"prompts: got {path} (not UTF-8), expected a text file") from None
    lines: list[Line] = []
    for number, line in enumerate(text.split("\n"), 1):
        source, said = f"{path}:{number}", line.strip()
        if said and path.suffix == ".jsonl":
            lines.append((source, _json_line(said, source, path.parent)))
        elif said:
            lines.append((source, PromptLine(prompt=said)))
    if not lines:
        raise InputError(f"prompts: got no line in {path}, expected at least one prompt")
    return lines


def _json_line(line: str, source: str, folder: pathlib.Path) -> PromptLine:
    said = from_mapping(PromptLine, parse_object(line.encode(), source), source=source)
    files = {name: getattr(said, name) for name in ("image", "mask")}
    found = {name: str(folder / file) for name, file in files.items() if file is not None}
    return dataclasses.replace(said, **found)


def expand(lines: Sequence[Line], common: PromptLine, *, numbered: bool) -> Iterator[Job]:
    """One job per picture: image j of a prompt has seed `seed + j`, wherever the prompt stands.

    `common` is what holds where a line is silent. `numbered` names files by the line's position (a
    batch job) instead of by the prompt's words.
    """
    for index, (source, line) in enumerate(lines):
        asks = _filled(line, common)
        head = f"{index:06d}" if numbered else slug(line.prompt)
        with prefix_errors(source):
            seeds = _seeds(asks.seed or 0, 1 if asks.num_images is None else asks.num_images)
        for seed in seeds:
            yield Job(name=f"{head}_{seed}", source=source, asks=asks, seed=seed)


def _filled(line: PromptLine, common: PromptLine) -> PromptLine:
    """`line` with what it leaves out; a common mask or strength is for those with a picture."""
    own = {k: v for k, v in dataclasses.asdict(line).items() if v is not None}
    filled = dataclasses.replace(common, **own)
    if filled.image is None:
        return dataclasses.replace(filled, mask=line.mask, strength=line.strength)
    return filled


def _seeds(first: int, count: int) -> range:
    in_range("num_images", count, 1, 1_000_000)
    in_range("seed", first, 0, 2**32 - 1)
    in_range("seed", first + count - 1, 0, 2**32 - 1)
    return range(first, first + count)
