"""How long the stages of a work take, apart from what is done once."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

_THREAD = threading.local()


def note_compiling(seconds: float) -> float:
    """Count `seconds` of compiling for the thread that has done it; returns them."""
    _THREAD.compile_s = compile_s_of_thread() + seconds
    return seconds


def compile_s_of_thread() -> float:
    """Seconds that compiling has taken so far in the thread that asks."""
    return getattr(_THREAD, "compile_s", 0.0)


class StageTimer:
    """Seconds by stage, those of compiling counted apart.

    `compile_s` says how many seconds compiling has taken so far.
    """

    def __init__(self, stages: Sequence[str], compile_s: Callable[[], float]) -> None:
        self._compile_s = compile_s
        self._started = time.perf_counter()
        self._compiled = compile_s()
        self._seconds = dict.fromkeys(stages, 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time within the context for a stage."""
        started, compiled = time.perf_counter(), self._compile_s()
        yield
        compiling = self._compile_s() - compiled
        self._seconds[stage] += time.perf_counter() - started - compiling

    def timings(self) -> dict[str, float]:
        """Seconds of each stage, of compiling ("compile_s") and of all ("total_s")."""
        return self._seconds | {
            "compile_s": self._compile_s() - self._compiled,
            "total_s": time.perf_counter() - self._started,
        }
