"""Prepare the next batches in a thread while the devices compute."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxdiff.core.types import NDArray

JOIN_TIMEOUT_SECONDS = 10.0  # when leaving, for a batch that is no longer needed

Batch = dict[str, NDArray]


@runtime_checkable
class BatchIterator(Protocol):
    """An endless iterator whose state can be saved."""

    def __next__(self) -> Batch:
        """The next batch of this process."""
        ...

    def get_state(self) -> Any:
        """The state as JSON values."""
        ...


class BatchWithState(NamedTuple):
    """A batch, and the state of its iterator after it, from which a resumed run continues."""

    batch: Any
    iterator_state: Any


class Prefetch:
    """`batches` through `to_device`, prepared in one thread up to `depth` ahead.

    The iterator state travels with its batch, so batches that were prepared but not used are
    prepared again after a restart. An exception in the thread is raised by the call that would have
    returned its batch. A context manager: leaving it ends the thread, unless a batch takes longer
    than JOIN_TIMEOUT_SECONDS.
    """

    def __init__(
        self, batches: BatchIterator, to_device: Callable[[Batch], Any], depth: int = 2
    ) -> None:
        self._batches, self._to_device = batches, to_device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._queue: deque[Future[BatchWithState]] = deque()
        for _ in range(depth):
            self._queue.append(self._thread.submit(self._make))

    def _make(self) -> BatchWithState:
        batch = self._to_device(next(self._batches))
        return BatchWithState(batch, self._batches.get_state())

    def __next__(self) -> BatchWithState:
        self._queue.append(self._thread.submit(self._make))
        return self._queue.popleft().result()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        wait(
            [future for future in self._queue if not future.cancelled()],
            timeout=JOIN_TIMEOUT_SECONDS,
        )
