"""The next batches are made in a thread while the device works on this one."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxdiff.core.types import NDArray

ENOUGH = 10.0  # seconds for a batch that nobody needs any more

Batch = dict[str, NDArray]


@runtime_checkable
class Batches(Protocol):
    """An endless iterator whose position can be saved."""

    def __next__(self) -> Batch:
        """The next batch of this process."""
        ...

    def get_state(self) -> Any:
        """The position as JSON values."""
        ...


class Positioned(NamedTuple):
    """A batch, and the position of its iterator right after it, where a resumed run goes on."""

    batch: Any
    position: Any


class Prefetch:
    """`batches` through `place` (host to device), made in one thread up to `depth` ahead.

    The position travels with its batch, so batches made ahead but never used are made again after
    a restart. An exception in the thread is raised by the call that would have returned its batch.
    A context manager: leaving it ends the thread, but for a batch that takes longer than ENOUGH.
    """

    def __init__(self, batches: Batches, place: Callable[[Batch], Any], depth: int = 2) -> None:
        self._batches, self._place = batches, place
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[Positioned]] = deque()
        for _ in range(depth):
            self._ahead.append(self._thread.submit(self._make))

    def _make(self) -> Positioned:
        batch = self._place(next(self._batches))
        return Positioned(batch, self._batches.get_state())

    def __next__(self) -> Positioned:
        self._ahead.append(self._thread.submit(self._make))
        return self._ahead.popleft().result()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        wait([future for future in self._ahead if not future.cancelled()], timeout=ENOUGH)
