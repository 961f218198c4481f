"""Tickets: what is known of an image that an engine generates, from its request to its pixels."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from jaxdiff.core.types import NDArray
from jaxdiff.pipeline.request import Request

# The states of a ticket, in their order, and the ways in which it ends.
WAITING, SAMPLING, DECODING = "waiting", "sampling", "decoding"
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"


class QueueFullError(RuntimeError):
    """An engine has as many waiting requests as it takes."""


class CancelledError(RuntimeError):
    """A ticket was cancelled, or its engine closed, before the image was there."""


class NonFiniteError(RuntimeError):
    """The image has numbers that are not finite; the message says since when."""


class GeneratedImage(NamedTuple):
    """An image, or latents, and what it was generated from."""

    image: NDArray  # uint8 (h, w, 3), float32 latents (h, w, c), or an embedding (d,)
    request: Request
    seconds: dict[str, float]  # "waiting", "sampling", "decoding"


class Ticket:
    """The place of a request in an engine: its state, and a `Future` of its image.

    `progress` is the number of steps done, and of all. Of tickets with equal `priority` those that
    were given out first come first; lower numbers come before higher ones.
    """

    def __init__(
        self,
        request: Request,
        *,
        priority: int = 0,
        number: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
        output: str | None = None,
    ) -> None:
        self.request, self.priority, self.number = request, priority, number
        self.output = output  # the form of the image; None: that of the engine
        self.state = WAITING
        self.progress: tuple[int, int] = (0, request.steps)
        self.future: Future[GeneratedImage] = Future()
        self.on_progress = on_progress
        # each gets the first one after its number of steps
        self.previews: list[tuple[int, Callable[[NDArray], None]]] = []
        self.times = {WAITING: time.monotonic()}
        self._lock = threading.Lock()

    def __lt__(self, other: "Ticket") -> bool:
        return (self.priority, self.number) < (other.priority, other.number)

    def result(self, timeout: float | None = None) -> GeneratedImage:
        """The image, when it is there.

        Raises CancelledError, NonFiniteError, InputError for a request that turns out not to be
        possible, and TimeoutError after `timeout` seconds.
        """
        return self.future.result(timeout)

    def cancel(self) -> bool:
        """Give up the image; its slot is free at the end of the chunk. False if it is over."""
        return self.end(CANCELLED, CancelledError("the request was cancelled"))

    def preview(self, callback: Callable[[NDArray], None], *, step: int = 0) -> None:
        """Call back with the image as it looks after `step` steps, or the chunk that runs now."""
        self.previews.append((step, callback))

    @property
    def steps_to_preview(self) -> int | None:
        """How many steps are left to the next preview that is wanted; None: there is none."""
        return min((max(step - self.progress[0], 0) for step, _ in self.previews), default=None)

    def advance(self, done: int, steps: int) -> None:
        """Note the steps done; an error of the callback ends the ticket."""
        self.progress = done, steps
        if self.on_progress is not None:
            self._call(lambda call: call(done, steps), [self.on_progress])

    def take_previews(self) -> list[Callable[[NDArray], None]]:
        """The callbacks of the previews that are due; they get no other one."""
        done, asked = self.progress[0], self.previews
        self.previews = [each for each in asked if each[0] > done]
        return [call for step, call in asked if step <= done]

    def show(self, image: NDArray, callbacks: Sequence[Callable[[NDArray], None]]) -> None:
        """Give a preview to those who have asked for one."""
        self._call(lambda call: call(image), callbacks)

    def _call(self, call: Callable[[Any], None], callbacks: Sequence[Any]) -> None:
        try:
            for callback in callbacks:
                call(callback)
        except Exception as error:
            self.end(FAILED, error)

    def enter(self, state: str) -> None:
        """Go on to another state, unless it is over."""
        with self._lock:
            if not self.future.done():
                self.state = state
                self.times.setdefault(state, time.monotonic())

    def end(self, state: str, result: GeneratedImage | BaseException) -> bool:
        """End in `state` with an image or an error; False if it was over already."""
        with self._lock:
            if self.future.done():
                return False
            self.state = state
            self.times[state] = time.monotonic()
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)
        return True

    def seconds(self) -> dict[str, float]:
        """How long it has been in each of its states."""
        marks = [*self.times.items()]
        ends = [*(at for _, at in marks[1:]), time.monotonic()]
        return {name: end - at for (name, at), end in zip(marks, ends, strict=True)}
