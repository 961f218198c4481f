"""Batch jobs of `jaxdiff generate`: prompt files of any length, in shards, into any output."""

import functools
import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdiff.cli.progress import Progress
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import one_of
from jaxdiff.generation.input_files import input_suffix, is_url
from jaxdiff.generation.open_output import CONTAINERS, open_output
from jaxdiff.generation.prompt_rows import JSON_LINES, TEXT
from jaxdiff.generation.prompt_spec import PromptSpec
from jaxdiff.generation.prompt_stream import BadLine, PromptLine, read_prompts
from jaxdiff.generation.shards import Shard, shard_from_environment

HEAD = 100  # lines that tell requests of OpenAI's Batch API from others
SMALL = 10_000  # lines; of files with so many all are checked before an image is generated
# What only batch jobs have; each needs --prompts.
OPTIONS = ("shard", "container", "image_format", "quality", "columns", "max_bad_lines")


def chosen_shard(options: Any) -> Shard | None:
    """The shard of --shard, or that of the environment; None if neither names one."""
    if options.shard is not None:
        return Shard.parse(options.shard)
    found = shard_from_environment()
    if found is None or found.shard.count == 1:
        return None
    print(f"generate: shard {found.shard} ({found.origin})", file=sys.stderr)
    return found.shard


def is_batch_job(options: Any, shard: Shard | None) -> bool:
    """Whether the prompts are those of a batch job, and not of a small file of prompts."""
    if options.prompts is None:
        return False
    chosen = any(getattr(options, name) not in (None, ()) for name in OPTIONS)
    plain = input_suffix(options.prompts) in (*TEXT, *JSON_LINES)
    if shard is not None or chosen or not plain or _is_remote(options):
        return True
    for number, line in enumerate(read_prompts(options.prompts)):
        if number == SMALL or line.custom_id is not None:
            return True
    return False


def _is_remote(options: Any) -> bool:
    return is_url(options.prompts) or is_url(options.output)


def columns_of(texts: tuple[str, ...]) -> dict[str, str] | None:
    """The columns that FIELD=COLUMN name, by field; None without any. Raises InputError."""
    pairs = [text.partition("=") for text in texts]
    for text, (field, sign, column) in zip(texts, pairs, strict=True):
        if not (field and sign and column):
            raise InputError(f"columns: got {text!r}, expected FIELD=COLUMN such as prompt=caption")
    return {field: column for field, _, column in pairs} or None


def container_of(chosen: str | None, lines: Iterator[PromptLine | BadLine]) -> str:
    """The `chosen` container, or that for these `lines`, of which the first HEAD are looked at.

    InputError for one that does not suit them, and for a file that cannot be read.
    """
    if chosen is not None:
        one_of("container", chosen, CONTAINERS)
    is_openai = any(line.custom_id is not None for line in itertools.islice(lines, HEAD))
    container = chosen or ("openai" if is_openai else "folder")
    if (container == "openai") != is_openai:
        kind = "requests" if is_openai else "no requests"
        raise InputError(
            f"container: got {container} for a file with {kind} of OpenAI's Batch API, "
            f"expected {'openai' if is_openai else 'folder or tar'}"
        )
    return container


def run_batch_job(
    options: Any, defaults: PromptSpec, shard: Shard | None, shared: Mapping[str, Any], load: Any
) -> dict[str, Any]:
    """Generate what is missing of a batch job; returns its report.

    `load` gives the model, the stages that follow, and the settings of both. Raises InputError.
    """
    from jaxdiff.generation.batch_job import BatchJob, check_line, job_key

    started, shard, columns = time.perf_counter(), shard or Shard(), columns_of(options.columns)
    container = container_of(options.container, read_prompts(options.prompts, columns=columns))
    with Progress(quiet=options.json) as progress:
        progress.phase(f"loading {options.model or 'the embedded model'}")
        pipe, stages, settings = load()
        matters = {name: getattr(options, name) for name in ("vae_tile", "image_format", "quality")}
        key = job_key(options.prompts, settings, shared, vars(defaults), matters, {"in": container})
        output = open_output(
            options.output,
            key=key,
            shard=shard,
            container=container,
            image_format=options.image_format or "png",
            quality=options.quality,
            prompts=options.prompts,
        )
        job = BatchJob(
            pipe=pipe,
            stages=stages,
            options=shared,
            defaults=defaults,
            settings=settings,
            output=output,
            max_bad_lines=100 if options.max_bad_lines is None else options.max_bad_lines,
            on_failure=lambda reason: print(f"generate: {reason}", file=sys.stderr),
            on_image=lambda: progress.add_images(1),
        )
        progress.start(None, compile_s=None)
        check = functools.partial(check_line, shared)
        lines = read_prompts(options.prompts, shard=shard, columns=columns, check=check)
        try:
            timings = job.run(lines, batch_size=options.batch_size, vae_tile=options.vae_tile)
        except KeyboardInterrupt:
            done = len(output.manifest)
            raise KeyboardInterrupt(f"{done} images are done; the same command resumes") from None
    seconds = timings.pop("generate_s")
    return {
        "count": len(output.manifest),
        "images": [],
        "seeds": [],
        "manifest": output.manifest.path,
        "shard": str(shard),
        "failed": job.failed,
        "bad_lines": job.bad_lines,
        "renamed": 0,
        "skipped": job.skipped,
        **{name: round(value, 4) for name, value in timings.items()},
        "images_per_s": round(job.made / seconds, 4) if job.made else None,
        "device": pipe.device_name,
        "offload": options.offload,
        "total_s": round(time.perf_counter() - started, 4),
    }
