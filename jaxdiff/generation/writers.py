"""Threads that encode and write images while the next ones are generated."""

import queue
import threading

from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.core.validate import positive
from jaxdiff.generation.outputs import ImageItem, Output

THREADS = 4
QUEUE_SIZE = 64  # images


class Writers:
    """`threads` threads that write to `output`, with up to `queue_size` images that wait for them.

    An error of a thread is raised by the next call as a WriteError; nothing more is written then.
    """

    def __init__(
        self, output: Output, *, threads: int = THREADS, queue_size: int = QUEUE_SIZE
    ) -> None:
        positive("threads", threads)
        self.output = output
        self._queue: queue.Queue[ImageItem | None] = queue.Queue(positive("queue_size", queue_size))
        self._error: Exception | None = None
        self._closed = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, item: ImageItem) -> None:
        """Write an image soon; waits while the queue is full. Raises WriteError."""
        if self._closed:
            raise ValueError("submit: got an image after close, expected none")
        while True:
            self._raise()
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def close(self) -> None:
        """Wait until all images are written, and close the output. Raises WriteError."""
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)  # after an error the threads empty the queue
        for thread in self._threads:
            thread.join()
        if self._error is None:
            self.output.close()
        else:
            self.output.abort()
            self._raise()

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except InputError:
            if error is None:
                raise

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue
            try:
                self.output.write(item)
            except Exception as error:  # for the thread that generates images
                self._error = self._error or error

    def _raise(self) -> None:
        if self._error is None:
            return
        if isinstance(self._error, InputError):
            raise self._error
        raise WriteError(f"output: got {self._error!r:.200}, expected to write") from self._error
