"""The prompts of a file of any length, one by one, and the images that each of them asks for."""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.generation.input_files import is_url
from jaxdiff.generation.openai_batch import custom_id_of, is_batch_request, parse_request
from jaxdiff.generation.prompt_rows import Row, read_rows
from jaxdiff.generation.prompt_spec import (
    PromptSpec,
    image_name,
    image_seeds,
    parse_spec,
    with_defaults,
)
from jaxdiff.generation.shards import Shard


class PromptLine(NamedTuple):
    """A line of a prompt file; `index` counts the lines from 0, without empty ones."""

    index: int
    source: str  # FILE:LINE
    spec: PromptSpec
    custom_id: str | None = None  # this and the next ones of a request of OpenAI's Batch API
    model: str | None = None  # what it asks for
    image_format: str | None = None  # None: the job's
    quality: int | None = None  # of WebP and JPEG; None: the job's


class BadLine(NamedTuple):
    """A line without a prompt that can be generated; `reason` is a sentence that names it."""

    index: int
    source: str
    reason: str
    custom_id: str | None = None


class LineImage(NamedTuple):
    """One image of a line; None in its `spec` means the model's default."""

    line: PromptLine
    number: int  # among the line's images, from 0
    count: int  # of the line's images
    spec: PromptSpec  # of the line, with the defaults
    seed: int
    name: str  # of the file, without suffix

    @property
    def former_name(self) -> str:
        """The name that earlier versions gave it."""
        return f"{self.line.index:06d}_{self.seed}"


def read_prompts(
    where: str | pathlib.Path,
    *,
    shard: Shard | None = None,
    columns: Mapping[str, str] | None = None,
    check: Callable[[PromptSpec], None] | None = None,
) -> Iterator[PromptLine | BadLine]:
    """The lines of the prompt file at `where`, a path or a URL, that are the shard's.

    A line is in memory while it is asked for, so files have any length. `columns` is that of
    `read_rows`. `check` raises InputError for a prompt that suits no model, which makes its line a
    bad one. Raises InputError for a file that cannot be read.
    """
    shard = shard or Shard()
    text = str(where)
    folder = text.rpartition("/")[0] if is_url(text) else str(pathlib.Path(text).parent)
    for row in read_rows(where, owns=shard.owns, columns=columns):
        yield _line(row, folder, check)


def _line(row: Row, folder: str, check: Callable[[PromptSpec], None] | None) -> Any:
    custom_id = None
    try:
        if row.values is None:
            raise InputError(row.problem)
        if is_batch_request(row.values):
            custom_id = custom_id_of(row.values)
            request = parse_request(row.values, row.source)
            spec = parse_spec(request.values, row.source, folder)
            line = PromptLine(
                row.index,
                row.source,
                spec,
                request.custom_id,
                request.model,
                request.image_format,
                request.quality,
            )
        else:
            line = PromptLine(row.index, row.source, parse_spec(row.values, row.source, folder))
        with prefix_errors(row.source):
            image_seeds(line.spec)
            if check is not None:
                check(line.spec)
    except InputError as error:
        return BadLine(row.index, row.source, str(error), custom_id)
    return line


def line_images(line: PromptLine, defaults: PromptSpec) -> Iterator[LineImage]:
    """The images of a line; `defaults` has what it leaves out. Image j has `seed + j`.

    Raises InputError where the defaults lead to seeds out of range.
    """
    spec = with_defaults(line.spec, defaults)
    with prefix_errors(line.source):
        seeds = image_seeds(spec)
    for number, seed in enumerate(seeds):
        name = image_name(line.index, spec.prompt, seed)
        yield LineImage(line, number, len(seeds), spec, seed, name)
