"""Generate the images of many jobs, batch by batch, into a folder of PNG files."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxdiff.core.atomic import os_errors_as_write_error, remove_leftovers
from jaxdiff.core.configs import prefix_errors
from jaxdiff.core.errors import InputError
from jaxdiff.data.image_arrays import ImageFileError
from jaxdiff.generation.engine import Engine
from jaxdiff.generation.finisher import Finisher, Outcome, StageFinisher
from jaxdiff.generation.png_files import file_digest, read_settings, write_png
from jaxdiff.generation.prompt_file import IMAGES, ImageJob, PromptSpec, expand_jobs
from jaxdiff.generation.tickets import GeneratedImage, NonFiniteError
from jaxdiff.pipeline.batches import STAGES
from jaxdiff.pipeline.intermediates import NO_INTERMEDIATES
from jaxdiff.pipeline.nonfinite import REMEDIES
from jaxdiff.pipeline.output import Output
from jaxdiff.pipeline.request import Request, Requests, check_options
from jaxdiff.pipeline.stages import Stage, first_requests, output_for, run_stages

PER_IMAGE = (  # lists in a call
    "negative_prompt",
    "prompt_2",
    "negative_prompt_2",
    "prompt_3",
    "negative_prompt_3",
)
NUMBERS = ("guidance_scale", "steps", "strength")  # lists too, unless an image has none


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
                settings = {**self.settings, **_file_settings(job, digest)}
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
        requests = first_requests(stages, [image.request for image in images])
        sampled: dict[int, float] = {}  # of each image, by number

        def note(number: int, done: int, steps: int) -> None:
            sampled[number] = done / steps
            on_progress(sum(sampled.values()))

        began, compiled = time.perf_counter(), self.pipe.stages.compile_s
        size = min(batch_size, len(images))
        engine = Engine(
            self.pipe,
            slots=size,
            max_waiting=2 * size,
            output=output_for(self.pipe, stages, "numpy"),
            vae_tile=vae_tile,
        )
        write = functools.partial(self._write, on_images=on_images)
        seconds = dict.fromkeys((*STAGES, "compile_s", "total_s"), 0.0)  # of the stages
        finisher: Finisher = Finisher(write, engine.fail)
        if stages:
            settings = {"vae_tile": vae_tile, "batch_size": size}
            run = functools.partial(self._run_stages, stages, settings, seconds)
            finisher = StageFinisher(write, engine.fail, run, size)
        with finisher, engine:
            for number, (image, request) in enumerate(zip(images, requests, strict=True)):
                ticket = engine.submit(request, on_progress=functools.partial(note, number))
                ticket.future.add_done_callback(functools.partial(finisher.put, image))
        timings = {name: engine.timer.timings()[name] + seconds[name] for name in STAGES}
        compile_s = self.pipe.stages.compile_s - compiled + seconds["compile_s"]
        generate_s = time.perf_counter() - began - compile_s
        return {**timings, "compile_s": compile_s, "generate_s": generate_s}

    def _write(
        self, planned: PlannedImage, result: Outcome, on_images: Callable[[int], None]
    ) -> None:
        """Write an image, or note why there is none."""
        if isinstance(result, Exception):
            self._fail(planned.job, f"{planned.job.name}: {result}")
        else:
            write_png(planned.path, Image.fromarray(result), planned.settings)
        on_images(1)

    def _run_stages(
        self,
        stages: Sequence[Stage],
        settings: Mapping[str, Any],
        seconds: dict[str, float],
        planned: Sequence[PlannedImage],
        images: Sequence[GeneratedImage],
    ) -> list[Outcome]:
        """What the stages after the first make of a batch."""
        first = Output(
            images=np.stack([image.image for image in images]),
            requests=Requests(image.request for image in images),
            timings=dict.fromkeys(seconds, 0.0),
            intermediates=NO_INTERMEDIATES,
        )
        arguments = self._stage_arguments(planned)
        out = run_stages(stages, first, arguments, output="numpy", **settings)
        for name in seconds:
            seconds[name] += out.timings[name]
        why = {
            n: f"got numbers that are not finite {text}, {REMEDIES}"
            for n, text in out.failures.items()
        }
        return [NonFiniteError(why[n]) if n in why else image for n, image in enumerate(out.images)]

    def _stage_arguments(self, images: Sequence[PlannedImage]) -> dict[str, Any]:
        """The arguments of a call for the images of a batch, with numbers of the first model."""
        arguments = self._arguments([image.job for image in images])
        for name in NUMBERS:
            if name in images[0].settings:
                arguments[name] = [image.settings[name] for image in images]
        return arguments

    def _arguments(self, jobs: Sequence[ImageJob]) -> dict[str, Any]:
        """The pipeline's arguments for jobs that can share a call."""
        specs = [job.spec for job in jobs]
        numbers = {name: [getattr(spec, name) for spec in specs] for name in NUMBERS}
        images = {
            name: paths
            for name in IMAGES
            if None not in (paths := [getattr(spec, name) for spec in specs])
        }
        names = {name for spec in specs for name in spec.options}
        return {
            **images,
            **self.options,
            **{name: [spec.options.get(name) for spec in specs] for name in names},
            "prompt": [spec.prompt for spec in specs],
            **{name: [getattr(spec, name) for spec in specs] for name in PER_IMAGE},
            **{name: None if None in column else column for name, column in numbers.items()},
            "seed": [job.seed for job in jobs],
        }


def check_jobs(jobs: Sequence[ImageJob], defaults: PromptSpec, options: Mapping[str, Any]) -> None:
    """InputError for jobs, or `options` of all of them, that suit no model: none is needed."""
    check_options({**options, **_own_options(defaults)})  # a bad option is no mistake of a line
    for job in {id(job.spec): job for job in jobs}.values():  # once for all images of a line
        with prefix_errors(job.source):
            check_options({**options, **_own_options(job.spec)})


def _own_options(spec: PromptSpec) -> dict[str, Any]:
    """What a line says of its images, but for files."""
    names = ("prompt", *PER_IMAGE, *NUMBERS)
    return {**spec.options, **{name: getattr(spec, name) for name in names}}


def is_same(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether two images have the same settings; None stands for one that is left out."""
    return all(stored.get(name) == settings.get(name) for name in {*stored, *settings})


def _file_settings(job: ImageJob, digest: Callable[[pathlib.Path], str]) -> dict[str, Any]:
    """The entries of images and mask in the settings: name and digest of each file."""
    paths = {name: pathlib.Path(getattr(job.spec, name) or "") for name in IMAGES}
    return {name: f"{path.name} {digest(path)}" for name, path in paths.items() if path.name}
