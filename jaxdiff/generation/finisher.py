"""Threads that take what an engine has generated, run the stages that follow, and write it."""

import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import NDArray
from jaxdiff.generation.tickets import CancelledError, GeneratedImage, NonFiniteError

WRITERS = 2  # threads
QUEUED = 64  # images that wait for a thread

Outcome = NDArray | Exception  # an image, or why there is none
Write = Callable[[Any, Outcome], None]  # of what was planned, and what came of it


class Finisher:
    """Threads that write images; `put` waits while QUEUED of them are waiting.

    Leaving the context waits for all of them. After an error of a thread nothing more is written,
    `on_error` is called once with it, and leaving the context raises it.
    """

    def __init__(self, write: Write, on_error: Callable[[BaseException], None]) -> None:
        self._write, self._on_error = write, on_error
        self._queue: queue.Queue[tuple[Any, GeneratedImage | Exception] | None]
        self._queue = queue.Queue(QUEUED)
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(WRITERS)]

    def __enter__(self) -> "Finisher":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        if self._error is not None and self._error is not error:
            raise self._error from None

    def put(self, planned: Any, future: Future[GeneratedImage]) -> None:
        """Write what a ticket's future has: a callback for when it is done."""
        error = future.exception()
        if self._error is not None:
            return
        if error is None:
            self._queue.put((planned, future.result()))
        elif isinstance(error, InputError | NonFiniteError):
            self._queue.put((planned, error))
        elif not isinstance(error, CancelledError):
            self._fail(error)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            self._guarded(self._take, *entry)

    def _take(self, planned: Any, result: GeneratedImage | Exception) -> None:
        self._write(planned, result if isinstance(result, Exception) else result.image)

    def _guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._error is not None:
            return
        try:
            function(*arguments)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            is_first, self._error = self._error is None, self._error or error
        if is_first:
            self._on_error(error)


class StageFinisher(Finisher):
    """Runs the stages that follow on up to `size` images of one kind at a time, and writes."""

    def __init__(
        self,
        write: Write,
        on_error: Callable[[BaseException], None],
        run: Callable[[Sequence[Any], Sequence[GeneratedImage]], Sequence[Outcome]],
        size: int,
    ) -> None:
        super().__init__(write, on_error)
        self._run_stages, self._size = run, size
        self._threads = self._threads[:1]
        self._groups: dict[Hashable, list[tuple[Any, GeneratedImage]]] = {}

    def _run(self) -> None:
        super()._run()
        for key in list(self._groups):
            self._guarded(self._finish, key)

    def _take(self, planned: Any, result: GeneratedImage | Exception) -> None:
        if isinstance(result, Exception):
            self._write(planned, result)
            return
        key = result.request.batch_key
        group = self._groups.setdefault(key, [])
        group.append((planned, result))
        if len(group) == self._size:
            self._finish(key)

    def _finish(self, key: Hashable) -> None:
        group = self._groups.pop(key)
        outcomes = self._run_stages([planned for planned, _ in group], [each for _, each in group])
        for (planned, _), outcome in zip(group, outcomes, strict=True):
            self._write(planned, outcome)
