"""From images that are planned to images that are written: the way that all jobs go."""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdiff.generation.engine import Engine
from jaxdiff.generation.finisher import Finisher, Outcome, StageFinisher, Write
from jaxdiff.generation.tickets import GeneratedImage, NonFiniteError
from jaxdiff.pipeline.batches import STAGES
from jaxdiff.pipeline.intermediates import NO_INTERMEDIATES
from jaxdiff.pipeline.nonfinite import REMEDIES
from jaxdiff.pipeline.output import Output
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.pipeline.request import Request, Requests
from jaxdiff.pipeline.stages import Stage, first_requests, output_for, run_stages

Progress = Callable[[float], None]  # how much is sampled, in images


def generate_images(
    pipe: Pipeline,
    stages: Sequence[Stage],
    planned: Iterable[tuple[Any, Request]],
    *,
    write: Write,
    stage_arguments: Callable[[Sequence[Any]], Mapping[str, Any]],
    slots: int,
    output: str = "numpy",
    vae_tile: int | None = None,
    on_progress: Progress = lambda sampled: None,
) -> dict[str, float]:
    """Generate what is `planned`, each with its request, and `write` it; returns seconds by name.

    `planned` is read as there is room. `write` is called, in other threads, with what was planned
    and its image, or the reason why there is none. `stage_arguments` are the arguments of the call
    for those that `stages` go on from. "generate_s" is the time of all but compiling.
    """
    began, compiled = time.perf_counter(), pipe.stages.compile_s
    seconds: dict[str, float] = dict.fromkeys((*STAGES, "compile_s", "total_s"), 0.0)  # of stages
    engine = Engine(
        pipe,
        slots=slots,
        max_waiting=4 * slots,
        output=output_for(pipe, stages, output),
        vae_tile=vae_tile,
    )
    finisher: Finisher = Finisher(write, engine.fail)
    if stages:
        settings = {"vae_tile": vae_tile, "batch_size": slots, "output": output}
        run = functools.partial(_run_stages, stages, stage_arguments, settings, seconds)
        finisher = StageFinisher(write, engine.fail, run, slots)
    progress = _Progress(on_progress)
    with finisher, engine:
        for own, request in planned:
            (first,) = first_requests(stages, [request])
            ticket = engine.submit(first, on_progress=progress.of_next())
            ticket.future.add_done_callback(functools.partial(finisher.put, own))
    timings = {name: engine.timer.timings()[name] + seconds[name] for name in STAGES}
    compile_s = pipe.stages.compile_s - compiled + seconds["compile_s"]
    return {
        **timings,
        "compile_s": compile_s,
        "generate_s": time.perf_counter() - began - compile_s,
    }


class _Progress:
    """How much of all images is sampled, of the steps that each has made."""

    def __init__(self, on_progress: Progress) -> None:
        self._on_progress, self._sampled = on_progress, 0.0

    def of_next(self) -> Callable[[int, int], None]:
        """What gets the steps of another image."""
        before = 0.0

        def note(done: int, steps: int) -> None:
            nonlocal before
            self._sampled += done / steps - before
            before = done / steps
            self._on_progress(self._sampled)

        return note


def _run_stages(
    stages: Sequence[Stage],
    stage_arguments: Callable[[Sequence[Any]], Mapping[str, Any]],
    settings: Mapping[str, Any],
    seconds: dict[str, float],
    planned: Sequence[Any],
    images: Sequence[GeneratedImage],
) -> list[Outcome]:
    """What the stages after the first make of a batch; their timings join `seconds`."""
    first = Output(
        images=np.stack([image.image for image in images]),
        requests=Requests(image.request for image in images),
        timings=dict.fromkeys(seconds, 0.0),
        intermediates=NO_INTERMEDIATES,
    )
    out = run_stages(stages, first, stage_arguments(planned), **settings)
    for name in seconds:
        seconds[name] += out.timings[name]
    failures: dict[int, Any] = {
        number: NonFiniteError(f"got numbers that are not finite {why}, {REMEDIES}")
        for number, why in out.failures.items()
    }
    return [failures.get(number, image) for number, image in enumerate(out.images)]
