"""Whether this process is shutting down, for threads that wait for something outside it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHUTDOWN_REQUESTED = threading.Event()  # set by SIGINT or SIGTERM, and when a command has returned


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the first SIGINT or SIGTERM; the second one has its default action.

    Outside the main thread, which Python gives all signals, the list stays empty.
    """
    received: list[int] = []
    SHUTDOWN_REQUESTED.clear()

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        SHUTDOWN_REQUESTED.set()
        signal.signal(number, previous[signal.Signals(number)])

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
