"""What all APIs stand on: a model with its engine, and the images that one request asks for."""

import asyncio
import logging
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from jaxdiff.core.errors import InputError
from jaxdiff.families.options import varies_image
from jaxdiff.generation.engine import Engine
from jaxdiff.generation.tickets import (
    DECODING,
    SAMPLING,
    CancelledError,
    GeneratedImage,
    NonFiniteError,
    QueueFullError,
    Ticket,
)
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.pipeline.request import Request
from jaxdiff.serve.errors import RequestError
from jaxdiff.serve.job_store import Jobs
from jaxdiff.serve.limits import Limits
from jaxdiff.serve.metrics import Metrics, Reason

LOG = logging.getLogger("jaxdiff.serve")
MAX_SEED = 2**32 - 1
MAX_RETRY_S = 600
CLOSE_S = 10.0
SMOOTHING = 0.2  # of the average time of an image: the weight of the newest one


class Generation:
    """The images that one HTTP request asks for, each with a ticket of the engine."""

    def __init__(self, service: "Service", owner: str = "") -> None:
        self.owner = owner  # who may see it: a hash of the API key
        self.tickets: list[Ticket] = []
        self._service = service
        self._reason: Reason = "cancelled"

    def add(self, ticket: Ticket) -> None:
        """One more of its tickets."""
        self.tickets.append(ticket)
        ticket.future.add_done_callback(lambda _: self._over(ticket))

    def cancel(self, reason: Reason = "cancelled") -> None:
        """Give up all images that are not there; their slots are free after the chunk that runs."""
        self._reason = reason
        for ticket in self.tickets:
            ticket.cancel()

    @property
    def progress(self) -> float:
        """How much of all steps is done, 0 to 1."""
        pairs = [(1, 1) if t.future.done() else t.progress for t in self.tickets]
        return sum(done / max(steps, 1) for done, steps in pairs) / max(len(pairs), 1)

    async def wait(self) -> None:
        """Return when each ticket is over."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        self.when_done(lambda: _call_in_loop(loop, over.set))
        await over.wait()

    def when_done(self, callback: Callable[[], object]) -> None:
        """Call back, from a thread of the engine, when each ticket is over."""
        left, lock = len(self.tickets), threading.Lock()

        def one_less(_: object) -> None:
            nonlocal left
            with lock:
                left -= 1
                is_last = left == 0
            if is_last:
                callback()

        for ticket in list(self.tickets):
            ticket.future.add_done_callback(one_less)

    def images(self) -> list[GeneratedImage]:
        """The images of tickets that are over; RequestError if one has none."""
        return [self.image_of(ticket) for ticket in self.tickets]

    def image_of(self, ticket: Ticket) -> GeneratedImage:
        """The image of a ticket that is over; RequestError with the reason if there is none."""
        return self._service.image_of(ticket)

    def _over(self, ticket: Ticket) -> None:
        error = ticket.future.exception()
        reason: Reason = "done"
        if isinstance(error, CancelledError):
            reason = self._reason
        elif isinstance(error, NonFiniteError):
            reason = "not_finite"
        elif error is not None:
            reason = "failed" if isinstance(error, InputError) else "error"
        self._service.note(ticket, reason)


def _call_in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:  # the loop is closed: nobody waits any more
        LOG.debug("an image came after the server had stopped")


class Service:
    """A model that is loaded in the background, warmed, and then generates for all APIs."""

    def __init__(
        self,
        load: Callable[[], Pipeline],
        *,
        slots: int = 8,
        max_waiting: int = 64,
        limits: Limits | None = None,
        lora_folder: pathlib.Path | None = None,
        name: str | None = None,
        vae_tile: int | None = None,
        jobs: Jobs | None = None,
    ) -> None:
        self.limits, self.slots, self.max_waiting = limits or Limits(), slots, max_waiting
        if max_waiting < self.limits.max_images:
            raise InputError(
                f"max_waiting: got {max_waiting}, expected at least the {self.limits.max_images} "
                "images of one request"
            )
        self.lora_folder, self.metrics = lora_folder, Metrics()
        self.created = int(time.time())
        self._load, self._name, self._vae_tile = load, name, vae_tile
        self.jobs = jobs or Jobs()
        self.calls: list[Any] = []  # of A1111's API, those that are being answered
        self._pipe: Pipeline | None = None
        self.engine: Engine | None = None
        self.draining = False
        self.error: BaseException | None = None  # what ended the loading
        self._seconds_per_image: float | None = None
        self._lock = threading.Lock()

    @property
    def pipe(self) -> Pipeline:
        """The model; RequestError while it is loaded."""
        if self._pipe is None or self.engine is None:
            raise self._unavailable("the model is loading")
        return self._pipe

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self._name or self.pipe.name

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine is not None and not self.draining and not self.is_broken

    @property
    def is_broken(self) -> bool:
        """Whether only a restart helps."""
        return self.error is not None or (self.engine is not None and self.engine.broken)

    def load(self) -> None:
        """Load the model and generate one image, which compiles what most requests need."""
        try:
            pipe = self._load()
            if pipe.family.embeddings is not None:
                raise InputError(
                    f"model: got {pipe.family.name}, which makes embeddings, expected one that "
                    "makes images"
                )
            engine = Engine(
                pipe,
                slots=self.slots,
                max_waiting=self.max_waiting,
                vae_tile=self._vae_tile,
                explain_failures=False,
            )
            try:
                engine.submit(first_request(pipe)).result()
            except NonFiniteError as error:  # other requests may be finite
                LOG.warning("the first image is not finite: %s", error)
            self._pipe, self.engine = pipe, engine
        except BaseException as error:
            self.error = error
            raise

    def resolve(
        self,
        prompt: str,
        *,
        num_images: int = 1,
        seed: int | None = None,
        image: Any = None,
        mask: Any = None,
        **options: Any,
    ) -> list[Request]:
        """The requests of `num_images` images with consecutive seeds, random ones for None.

        Raises InputError and RequestError for what the model or the limits refuse.
        """
        self.check_open()
        limits = self.limits
        texts = [value for name, value in options.items() if "prompt" in name]
        limits.check_texts([prompt, *(text for text in texts if isinstance(text, str))])
        first = secrets.randbelow(MAX_SEED - num_images) if seed is None else seed
        if not 0 <= first <= MAX_SEED - num_images + 1:
            raise InputError(f"seed: got {first}, expected a number from 0 to {MAX_SEED}")
        seeds = [first + number for number in range(num_images)]
        requests = self.pipe.resolve(prompt, seed=seeds, image=image, mask=mask, **options)
        limits.check(requests)
        return list(requests)

    def start(
        self,
        requests: Sequence[Request],
        *,
        priority: int = 0,
        owner: str = "",
        on_progress: Callable[[int, int, int], None] | None = None,
        output: str | None = None,
    ) -> Generation:
        """Give the requests to the engine: all of them, or none and RequestError with 429.

        `on_progress` gets the number of the image, its steps done, and of how many.
        """
        self.check_open()
        engine = self.engine
        if engine is None:
            raise self._unavailable("the model is loading")
        generation = Generation(self, owner)
        with self._lock:
            if engine.waiting + len(requests) > engine.max_waiting:
                raise self.too_busy()
            for number, request in enumerate(requests):
                callback = None
                if on_progress is not None:
                    callback = _numbered(on_progress, number)
                try:
                    ticket = engine.submit(
                        request,
                        priority=priority,
                        on_progress=callback,
                        block=False,
                        output=output,
                    )
                except QueueFullError:
                    generation.cancel()
                    raise self.too_busy() from None
                except CancelledError:
                    generation.cancel()
                    raise self._unavailable("the server is shutting down") from None
                generation.add(ticket)
        return generation

    def image_of(self, ticket: Ticket) -> GeneratedImage:
        """The image of a ticket that is over; RequestError with the reason if there is none."""
        error = ticket.future.exception()
        if error is None:
            return ticket.future.result()
        if isinstance(error, CancelledError):
            if self.draining:
                raise self._unavailable("the server is shutting down")
            raise RequestError(409, "the request was cancelled", code="cancelled")
        if isinstance(error, NonFiniteError):
            raise RequestError(500, f"image: {error}", code="image_not_finite")
        raise error

    def note(self, ticket: Ticket, reason: Reason) -> None:
        """Count a ticket that is over, and learn how long an image takes."""
        self.metrics.finish(ticket, reason)
        began = ticket.times.get(SAMPLING)
        if reason == "done" and began is not None:
            seconds = (ticket.times.get(DECODING, time.monotonic()) - began) / self.slots
            before = self._seconds_per_image
            self._seconds_per_image = (
                seconds if before is None else before + SMOOTHING * (seconds - before)
            )

    def retry_after(self) -> float:
        """Seconds until what waits now has a slot, by the time that images took so far."""
        waiting = 0 if self.engine is None else self.engine.waiting
        return min(max(1.0, waiting * (self._seconds_per_image or 1.0)), MAX_RETRY_S)

    def check_open(self) -> None:
        """RequestError with 503 while the model is loading, or the server is shutting down."""
        if self.draining:
            raise self._unavailable("the server is shutting down")
        if self.engine is None:
            raise self._unavailable("the model is loading")
        if self.is_broken:
            raise self._unavailable("the engine has stopped after an error")

    def drain(self, timeout: float | None) -> bool:
        """Take no more requests, and finish those in progress, in `timeout` seconds at most."""
        self.draining = True
        return self.engine is None or self.engine.close(drain=True, timeout=timeout)

    def close(self) -> bool:
        """Stop at once, and cancel images that are not done.

        Returns whether all threads have ended: a compilation can take longer than CLOSE_S.
        """
        self.draining = True
        if self.engine is not None:
            close = threading.Thread(target=self._close, daemon=True)
            close.start()
            close.join(CLOSE_S)
            return not close.is_alive()
        return True

    def _close(self) -> None:
        if self.engine is not None:
            self.engine.close(drain=False)

    def too_busy(self) -> RequestError:
        """The error of a full queue."""
        self.metrics.rejected.inc()
        waiting = 0 if self.engine is None else self.engine.waiting
        return RequestError(
            429,
            f"the queue is full: {waiting} images are waiting, try again later",
            code="queue_full",
            retry_after=self.retry_after(),
        )

    def _unavailable(self, why: str) -> RequestError:
        return RequestError(503, why, code="unavailable", retry_after=self.retry_after())

    def count_tokens(self, text: str) -> int:
        """The tokens of a text by the first tokenizer; 0 for a model without one."""
        if not text or not self.pipe.text_encoders:
            return 0
        return len(self.pipe.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def latent_positions(self, height: int, width: int) -> int:
        """How many latents an image of this size has."""
        downscale = self.pipe.codec.config.downscale
        return (height // downscale) * (width // downscale)

    def image_size(self, height: int, width: int) -> dict[str, int]:
        """The largest multiples of what the model generates within a size."""
        if self.pipe.family.enlarges or varies_image(self.pipe.family):
            return {}  # the size of the image is not that of what is generated
        multiple = self.pipe.codec.config.downscale * self.pipe.family.latent_multiple
        sides = {"height": height, "width": width}
        return {name: max(side // multiple, 1) * multiple for name, side in sides.items()}


def _numbered(callback: Callable[[int, int, int], None], number: int) -> Callable[[int, int], None]:
    return lambda done, steps: callback(number, done, steps)


def first_request(pipe: Pipeline) -> Request:
    """A request with all defaults, and a grey image where the model needs one."""
    grey = Image.new("RGB", (pipe.defaults.width, pipe.defaults.height), "grey")
    white = Image.new("L", grey.size, 255)
    tries: tuple[dict[str, Any], ...] = ({}, {"image": grey}, {"image": grey, "mask": white})
    for number, images in enumerate(tries):
        for prompt in ("", "0"):  # labels of classes have numbers
            try:
                return pipe.resolve(prompt, **images)[0]
            except InputError:
                if number == len(tries) - 1 and prompt:
                    raise
    raise AssertionError("unreachable")
