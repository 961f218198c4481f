"""Batch jobs: the lines of a prompt file of any length become images, each once."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.generation.arguments import NUMBERS, call_arguments, line_options
from jaxdiff.generation.finisher import Outcome
from jaxdiff.generation.generate_images import Progress, generate_images
from jaxdiff.generation.input_files import content_identity
from jaxdiff.generation.outputs import ImageItem, Output
from jaxdiff.generation.png_files import file_digest
from jaxdiff.generation.prompt_spec import PromptSpec
from jaxdiff.generation.prompt_stream import BadLine, LineImage, PromptLine, line_images
from jaxdiff.generation.runner import file_settings
from jaxdiff.pipeline.request import Request, Requests, check_options
from jaxdiff.pipeline.stages import Stage


class JobImage(NamedTuple):
    """An image of a line with its complete settings."""

    image: LineImage
    settings: dict[str, Any]


def check_line(options: Mapping[str, Any], spec: PromptSpec) -> None:
    """InputError for a line that suits no model, beside the `options` of all lines."""
    if spec.loras is not None:
        raise InputError("loras: got them for a line, expected --lora for all lines of a job")
    check_options({**options, **line_options(spec)})


def job_key(prompts: str | pathlib.Path, *options: Mapping[str, Any]) -> str:
    """A short hash of a job: of the options that matter and of the content of its prompt file."""
    content = json.dumps([content_identity(prompts), *options], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclasses.dataclass(kw_only=True)
class BatchJob:
    """The images of prompt lines, by a model, into an output; what is there already is kept.

    Lines without a prompt that can be generated are recorded and reported, up to `max_bad_lines`.
    """

    pipe: Any
    stages: Sequence[Stage]
    options: Mapping[str, Any]  # of the model's call, for all lines
    defaults: PromptSpec  # what lines leave out
    settings: Mapping[str, Any]  # of the model, stored with each image
    output: Output
    max_bad_lines: int
    on_failure: Callable[[str], None] = lambda reason: None
    on_image: Callable[[], None] = lambda: None  # called for an image that is over with
    made: int = 0  # images that were written
    skipped: int = 0  # that were there
    failed: int = 0  # that could not be generated
    bad_lines: int = 0
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    def run(
        self,
        lines: Iterable[PromptLine | BadLine],
        *,
        batch_size: int,
        vae_tile: int | None = None,
        on_progress: Progress = lambda sampled: None,
    ) -> dict[str, float]:
        """Generate what is missing; returns seconds by name. Raises InputError and WriteError."""
        bare = dataclasses.replace(self.defaults, prompt="", image=None, mask=None, strength=None)
        with_seed = LineImage(PromptLine(0, "", bare), 0, 1, bare, 0, "")
        self.pipe.resolve(**call_arguments([with_seed], self.options))  # no mistake of a line
        try:
            timings = generate_images(
                self.pipe,
                self.stages,
                self._missing(lines),
                write=self._write,
                stage_arguments=self._stage_arguments,
                slots=batch_size,
                vae_tile=vae_tile,
                output="latent" if self.output.stores_latents else "numpy",
                on_progress=on_progress,
            )
        except WriteError:
            self.output.abort()
            raise
        except BaseException:
            self.output.close()  # what is generated is written, a short tar too
            raise
        self.output.close()
        return timings

    def _missing(self, lines: Iterable[PromptLine | BadLine]) -> Iterator[tuple[JobImage, Request]]:
        """The images that are missing, with their requests."""
        digest = functools.lru_cache(1024)(file_digest)
        for line in lines:
            if isinstance(line, BadLine):
                self._note_bad(line)
                continue
            try:
                if line.model not in (None, self.pipe.name):
                    raise InputError(
                        f"{line.source}: model: got {line.model!r:.60}, expected {self.pipe.name}"
                    )
                for image in line_images(line, self.defaults):
                    if self.output.done(line.index, image.number):
                        self.skipped += 1
                    else:
                        yield self._resolved(image, digest)
            except InputError as error:
                reason = str(error)
                named = reason if line.source in reason else f"{line.source}: {reason}"
                self._note_bad(BadLine(line.index, line.source, named, line.custom_id))

    def _resolved(
        self, image: LineImage, digest: Callable[[pathlib.Path], str]
    ) -> tuple[JobImage, Request]:
        (request,) = self.pipe.resolve(**call_arguments([image], self.options))
        networks = self.pipe.auxiliary_fingerprints(Requests([request]))
        used = {n: hash_ for n, hash_ in networks.items() if getattr(request, f"{n}_scale")}
        files = file_settings(image.spec, digest)
        settings = {**self.settings, **files, **request.to_metadata(), **used}
        return JobImage(image, settings), request

    def _note_bad(self, line: BadLine) -> None:
        self.output.fail_line(line)
        self.on_failure(line.reason)
        self.bad_lines += 1
        if self.bad_lines > self.max_bad_lines:
            raise InputError(
                f"prompts: got {self.bad_lines} lines that cannot be generated, expected at most "
                f"{self.max_bad_lines} (--max-bad-lines)"
            )

    def _write(self, planned: JobImage, outcome: Outcome) -> None:
        image, settings = planned
        done = not isinstance(outcome, Exception)
        if isinstance(outcome, Exception):
            self.output.fail_item(ImageItem.of(image, None, settings), str(outcome))
            self.on_failure(f"{image.name}: {outcome}")
        else:
            self.output.write(ImageItem.of(image, outcome, settings))
        with self._lock:
            self.made += done
            self.failed += not done
        self.on_image()

    def _stage_arguments(self, planned: Sequence[JobImage]) -> dict[str, Any]:
        """The arguments of a call for the images of a batch, with numbers of the first model."""
        arguments = call_arguments([each.image for each in planned], self.options)
        for name in NUMBERS:
            if name in planned[0].settings:
                arguments[name] = [each.settings[name] for each in planned]
        return arguments
