"""The loop around the training step. All input and output is passed in as functions."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxdiff.core.types import Array, NDArray, PyTree
from jaxdiff.training.step import TrainState

JOIN_TIMEOUT_SECONDS = 10.0  # when leaving, for a batch that is no longer needed

Batch = dict[str, NDArray]


class NonFiniteError(RuntimeError):
    """The loss or a gradient was not finite in too many consecutive steps."""


class StoppedError(RuntimeError):
    """Training was asked to stop and has saved its state."""

    signal: int | None = None  # the signal that this process has received


def _no_metrics(step: int, state: TrainState) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls. Steps are numbers of finished updates: 1 after the first."""

    save: Callable[[int, TrainState, Any], None]  # step, state, state of the data iterator
    log: Callable[[int, Mapping[str, float]], None]  # step, values
    sample: Callable[[int, TrainState], Mapping[str, float]] = _no_metrics  # returns values to log
    snapshot: Callable[[int, TrainState], None] = lambda step, state: (
        None
    )  # of the power-function EMAs
    progress: Callable[[int], None] = lambda step: None  # after every step
    stop: Callable[[], bool] = lambda: False  # asked after every step


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When to stop and how often to do what, in steps."""

    steps: int
    log: int
    checkpoint: int
    sample: int  # 0: never
    snapshot: int = 0  # of power-function EMAs; 0: never
    max_nonfinite_steps: int  # consecutive skipped steps after which training stops


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


class _MetricAverager:
    """Metrics since the last log line, left on the device until they are averaged."""

    def __init__(self, images_per_step: int, max_consecutive: int) -> None:
        self._images, self._max_consecutive = images_per_step, max_consecutive
        self._consecutive = 0  # skipped steps, up to the last one that was checked
        self._checked = 0  # metrics that were checked
        self._metrics: list[Mapping[str, Any]] = []
        self._timed_steps = 0  # steps since the clock started
        self._data_wait = 0.0  # seconds of waiting for data since then
        self._started: float | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        if self._started is not None:
            self._data_wait += time.perf_counter() - start

    def add(self, metrics: Mapping[str, Array]) -> None:
        """Append one step's metrics; the host then waits while it is two steps ahead.

        The clock starts after the very first step, which is mostly compilation.
        """
        self._metrics.append(metrics)
        if self._started is None:
            jax.block_until_ready(metrics)
            self._started = time.perf_counter()
        else:
            self._timed_steps += 1
        if len(self._metrics) > 2:
            jax.block_until_ready(self._metrics[-3])

    def check(self, step: int) -> None:
        """Fetch all; NonFiniteError names the steps if too many in a row were skipped."""
        self._metrics = jax.device_get(self._metrics)
        first = step - len(self._metrics) + 1
        for i in range(self._checked, len(self._metrics)):
            metrics = self._metrics[i]
            self._consecutive = self._consecutive + 1 if metrics["nonfinite_steps"] else 0
            if self._consecutive == self._max_consecutive:
                bad = [n for n, value in metrics.items() if not np.isfinite(value)]
                raise NonFiniteError(
                    f"steps {first + i + 1 - self._max_consecutive} to {first + i} were skipped: "
                    f"{', '.join(f'{n} {metrics[n]}' for n in bad)} in the last of them"
                )
        self._checked = len(self._metrics)

    def close(self, step: int) -> dict[str, float]:
        """The means of the metrics, the number of skipped steps, and the speed; then start over.

        The means are over the steps that were not skipped. `data_wait` is the fraction of the
        time in which the loop waited for a batch.
        """
        self.check(step)
        good = [metrics for metrics in self._metrics if not metrics["nonfinite_steps"]]
        means = {name: float(np.mean([m[name] for m in good])) for name in (good or [{}])[0]}
        means["nonfinite_steps"] = float(len(self._metrics) - len(good))
        if self._timed_steps and self._started is not None:
            seconds = (time.perf_counter() - self._started) / self._timed_steps
            means |= {
                "step_ms": 1e3 * seconds,
                "images_per_s": self._images / seconds,
                "data_wait": self._data_wait / self._timed_steps / seconds,
            }
        self._metrics, self._checked = [], 0
        self._timed_steps, self._data_wait, self._started = 0, 0.0, time.perf_counter()
        return means

    @contextmanager
    def pause_clock(self) -> Iterator[None]:
        """Do not count the time inside as step time."""
        start = time.perf_counter()
        yield
        if self._started is not None:
            self._started += time.perf_counter() - start


def training_loop(
    step: Callable[[TrainState, PyTree, Any, Array], tuple[TrainState, Mapping[str, Array]]],
    state: TrainState,
    frozen: PyTree,
    batches: Prefetch,
    base_key: Array,
    *,
    intervals: Intervals,
    images_per_step: int,
    hooks: Hooks,
) -> TrainState:
    """Train from `state` to the last step and return the final state, saved.

    `step` skips an update that is not finite and reports it as the metric `nonfinite_steps`. Raises
    NonFiniteError after too many consecutive skipped steps, and StoppedError after saving.
    """
    step_count = int(state.step)
    averager = _MetricAverager(images_per_step, intervals.max_nonfinite_steps)
    while step_count < intervals.steps:
        with averager.waiting():
            batch, position = next(batches)
        state, metrics = step(state, frozen, batch, base_key)
        step_count += 1
        averager.add(metrics)
        hooks.progress(step_count)
        stopping = hooks.stop()
        last = step_count == intervals.steps
        values: dict[str, float] = {}
        if last or step_count % intervals.log == 0:
            values |= averager.close(step_count)
        if intervals.sample and (last or step_count % intervals.sample == 0):
            averager.check(step_count)
            with averager.pause_clock():
                values |= hooks.sample(step_count, state)
        if values:
            hooks.log(step_count, values)
        if intervals.snapshot and (last or step_count % intervals.snapshot == 0):
            with averager.pause_clock():
                hooks.snapshot(step_count, state)
        if stopping or last or step_count % intervals.checkpoint == 0:
            averager.check(step_count)
            with averager.pause_clock():
                hooks.save(step_count, state, position)
        if stopping and not last:
            raise StoppedError(f"stopped after step {step_count}")
    return state
