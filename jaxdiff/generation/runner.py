"""Generate the images of many jobs, batch by batch, into a folder of PNG files."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from jaxdiff.core.atomic import os_errors_as_write_error, remove_leftovers
from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.data.image_arrays import ImageFileError
from jaxdiff.generation.arguments import NUMBERS, call_arguments, line_options
from jaxdiff.generation.finisher import Outcome
from jaxdiff.generation.generate_images import generate_images
from jaxdiff.generation.png_files import file_digest, read_settings, write_png
from jaxdiff.generation.prompt_file import IMAGES, ImageJob, PromptSpec, expand_jobs
from jaxdiff.pipeline.batches import STAGES
from jaxdiff.pipeline.request import Request, Requests, check_options
from jaxdiff.pipeline.stages import Stage


class PlannedImage(NamedTuple):
    """A job, its complete settings, and its file."""

    job: ImageJob
    settings: dict[str, Any]
    request: Request
    path: pathlib.Path
    exists: bool  # with these settings

    @property
    def renamed(self) -> bool:
        """Whether it has a longer name, beside an image with other settings."""
        return self.path.stem not in (self.job.name, self.job.former_name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
    """A model, the options that all images share, and the folder for the images."""

    pipe: Any
    options: Mapping[str, Any]  # of the model's call
    settings: Mapping[str, Any]  # of the model, stored with each image
    output: pathlib.Path
    on_failure: Callable[[str], None] = lambda reason: None  # called for an image that failed
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # by name of the image

    def plan(self, jobs: Sequence[ImageJob], defaults: PromptSpec) -> list[PlannedImage]:
        """Each job with its settings; raises InputError before any image is generated.

        Of several jobs, those whose image or mask cannot be read become `failures`. Nothing is
        overwritten: an image whose name has a file with other settings gets a longer name.
        """
        digest = functools.cache(file_digest)
        # First without a prompt: a bad option is no mistake of a line.
        empty = PromptSpec(prompt="", num_images=1)
        (bare,) = expand_jobs([("", empty)], defaults, numbered=True)
        self.pipe.resolve(**self._arguments([bare]))
        rows: list[tuple[ImageJob, dict[str, Any], Request]] = []
        for job in jobs:
            with prefix_errors(job.source):
                try:
                    (request,) = self.pipe.resolve(**self._arguments([job]))
                except ImageFileError as error:
                    if len(jobs) == 1:
                        raise
                    self._fail(job, str(error))
                    continue
                settings = {**self.settings, **file_settings(job.spec, digest)}
                settings |= request.to_metadata()
                rows.append((job, settings, request))
        if not rows and jobs:
            raise InputError(next(iter(self.failures.values())))
        networks = self.pipe.auxiliary_fingerprints(Requests(request for _, _, request in rows))
        taken: dict[pathlib.Path, Mapping[str, Any]] = {}
        planned = []
        for job, settings, request in rows:
            used = {n: hash_ for n, hash_ in networks.items() if getattr(request, f"{n}_scale")}
            path, exists = self._file(job, settings | used, taken)
            planned.append(PlannedImage(job, settings | used, request, path, exists))
        return planned

    def _file(
        self,
        job: ImageJob,
        settings: Mapping[str, Any],
        taken: dict[pathlib.Path, Mapping[str, Any]],
    ) -> tuple[pathlib.Path, bool]:
        """The file of an image, which joins those `taken`, and whether it is there already."""
        own, former = (self.output / f"{n}.png" for n in (job.name, job.former_name or job.name))
        content = json.dumps(settings, sort_keys=True).encode()
        longer = own.with_stem(f"{own.stem}-{hashlib.sha256(content).hexdigest()[:8]}")
        for path in (former, own, longer):
            if is_same(read_settings(path) or {}, settings):
                return path, True
        path = longer if own.exists() or not is_same(taken.get(own, settings), settings) else own
        taken[path] = settings
        return path, False

    def _fail(self, job: ImageJob, reason: str) -> None:
        """Note and report that there is no image of `job`."""
        reason = reason if job.source in reason else f"{job.source}: {reason}".removeprefix(": ")
        self.failures[job.name] = reason
        self.on_failure(reason)

    def generate(
        self,
        images: Sequence[PlannedImage],
        stages: Sequence[Stage],
        *,
        batch_size: int,
        vae_tile: int | None = None,
        on_progress: Callable[[float], None],
        on_images: Callable[[int], None],
    ) -> dict[str, float]:
        """Generate and write the images; returns seconds by name, "generate_s" those of all.

        `batch_size` images share a step. Images are written as they are done, and stay if the rest
        is interrupted; what cannot be generated becomes `failures`. `on_progress` gets how much is
        sampled, in images, and `on_images` how many images are over with.
        """
        with os_errors_as_write_error(self.output, "a folder to write to"):
            self.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(image.path for image in images)
        if not images:
            return dict.fromkeys((*STAGES, "compile_s", "generate_s"), 0.0)
        return generate_images(
            self.pipe,
            stages,
            ((image, image.request) for image in images),
            write=functools.partial(self._write, on_images=on_images),
            stage_arguments=self._stage_arguments,
            slots=min(batch_size, len(images)),
            vae_tile=vae_tile,
            on_progress=on_progress,
        )

    def _write(
        self, planned: PlannedImage, result: Outcome, on_images: Callable[[int], None]
    ) -> None:
        """Write an image, or note why there is none."""
        if isinstance(result, Exception):
            self._fail(planned.job, f"{planned.job.name}: {result}")
        else:
            write_png(planned.path, Image.fromarray(result), planned.settings)
        on_images(1)

    def _stage_arguments(self, images: Sequence[PlannedImage]) -> dict[str, Any]:
        """The arguments of a call for the images of a batch, with numbers of the first model."""
        arguments = self._arguments([image.job for image in images])
        for name in NUMBERS:
            if name in images[0].settings:
                arguments[name] = [image.settings[name] for image in images]
        return arguments

    def _arguments(self, jobs: Sequence[ImageJob]) -> dict[str, Any]:
        """The pipeline's arguments for jobs that can share a call."""
        return call_arguments(jobs, self.options)


def check_jobs(jobs: Sequence[ImageJob], defaults: PromptSpec, options: Mapping[str, Any]) -> None:
    """InputError for jobs, or `options` of all of them, that suit no model: none is needed."""
    check_options({**options, **line_options(defaults)})  # a bad option is no mistake of a line
    for job in {id(job.spec): job for job in jobs}.values():  # once for all images of a line
        with prefix_errors(job.source):
            check_options({**options, **line_options(job.spec)})


def is_same(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether two images have the same settings; None stands for one that is left out."""
    return all(stored.get(name) == settings.get(name) for name in {*stored, *settings})


def file_settings(spec: PromptSpec, digest: Callable[[pathlib.Path], str]) -> dict[str, Any]:
    """The entries of images and mask in the settings: name and digest of each file."""
    paths = {name: pathlib.Path(getattr(spec, name) or "") for name in IMAGES}
    return {name: f"{path.name} {digest(path)}" for name, path in paths.items() if path.name}
