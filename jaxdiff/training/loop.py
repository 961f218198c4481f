"""The loop around the step. It receives everything that touches the world as functions."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxdiff.core.types import Array, PyTree
from jaxdiff.training.prefetch import Prefetch
from jaxdiff.training.state import TrainState


class NonFiniteError(RuntimeError):
    """The loss or a gradient was infinite or NaN in too many steps one after another."""


class StoppedError(RuntimeError):
    """Training was asked to stop and has saved its state."""


def _nothing(step: int, state: TrainState) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls. Steps are counts of finished updates: 1 after the first."""

    save: Callable[[int, TrainState, Any], None]  # step, state, position of the data
    log: Callable[[int, Mapping[str, float]], None]  # step, values
    sample: Callable[[int, TrainState], Mapping[str, float]] = _nothing  # returns values to log
    snapshot: Callable[[int, TrainState], None] = lambda step, state: None  # of averages
    progress: Callable[[int], None] = lambda step: None  # after every step
    stop: Callable[[], bool] = lambda: False  # asked after every step


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When to stop and how often to do what, in steps."""

    steps: int
    log: int
    checkpoint: int
    sample: int  # 0: never
    snapshot: int = 0  # of averages; 0: never
    skipped: int  # as many steps one after another that change nothing end the training


class _Window:
    """Metrics since the last log line, left on the device until their mean is asked for."""

    def __init__(self, images_per_step: int, max_skipped: int) -> None:
        self._images, self._max_skipped = images_per_step, max_skipped
        self._in_a_row = 0  # skipped steps, up to the last one that was checked
        self._checked = 0  # metrics of the window that were
        self._metrics: list[Mapping[str, Any]] = []
        self._timed = 0  # steps since the clock was set
        self._waited = 0.0  # seconds without data since then
        self._started: float | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside is waiting for data."""
        begin = time.perf_counter()
        yield
        if self._started is not None:
            self._waited += time.perf_counter() - begin

    def add(self, metrics: Mapping[str, Array]) -> None:
        """Append one step's metrics; the host then waits while it is two steps ahead.

        The clock starts after the very first step, which is mostly compilation.
        """
        self._metrics.append(metrics)
        if self._started is None:
            jax.block_until_ready(metrics)
            self._started = time.perf_counter()
        else:
            self._timed += 1
        if len(self._metrics) > 2:
            jax.block_until_ready(self._metrics[-3])

    def check(self, step: int) -> None:
        """Fetch all; NonFiniteError names the steps if too many in a row were skipped."""
        self._metrics = jax.device_get(self._metrics)
        first = step - len(self._metrics) + 1
        for i in range(self._checked, len(self._metrics)):
            metrics = self._metrics[i]
            self._in_a_row = self._in_a_row + 1 if metrics["skipped"] else 0
            if self._in_a_row == self._max_skipped:
                bad = [n for n, value in metrics.items() if not np.isfinite(value)]
                raise NonFiniteError(
                    f"steps {first + i + 1 - self._max_skipped} to {first + i} were skipped: "
                    f"{', '.join(f'{n} {metrics[n]}' for n in bad)} in the last of them"
                )
        self._checked = len(self._metrics)

    def close(self, step: int) -> dict[str, float]:
        """The means of the metrics, skips counted, and the speed; the window then begins anew.

        The means are over the steps that were not skipped. `data_wait` is the share of the time in
        which the loop had no batch to go on with.
        """
        self.check(step)
        good = [metrics for metrics in self._metrics if not metrics["skipped"]]
        means = {name: float(np.mean([m[name] for m in good])) for name in (good or [{}])[0]}
        means["skipped"] = float(len(self._metrics) - len(good))
        if self._timed and self._started is not None:
            seconds = (time.perf_counter() - self._started) / self._timed
            means |= {
                "step_ms": 1e3 * seconds,
                "images_per_s": self._images / seconds,
                "data_wait": self._waited / self._timed / seconds,
            }
        self._metrics, self._checked = [], 0
        self._timed, self._waited, self._started = 0, 0.0, time.perf_counter()
        return means

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """What is done inside does not count as time of the steps."""
        begin = time.perf_counter()
        yield
        if self._started is not None:
            self._started += time.perf_counter() - begin


def train(
    step: Callable[[TrainState, PyTree, Any, Array], tuple[TrainState, Mapping[str, Array]]],
    state: TrainState,
    frozen: PyTree,
    batches: Prefetch,
    base: Array,
    *,
    intervals: Intervals,
    images_per_step: int,
    hooks: Hooks,
) -> TrainState:
    """Train from `state` to the last step and return the final state, saved.

    `step` skips what is not finite and says so in its metric `skipped`. Raises NonFiniteError when
    too many steps in a row were skipped, and StoppedError after saving.
    """
    done = int(state.step)
    window = _Window(images_per_step, intervals.skipped)
    while done < intervals.steps:
        with window.waiting():
            batch, position = next(batches)
        state, metrics = step(state, frozen, batch, base)
        done += 1
        window.add(metrics)
        hooks.progress(done)
        stopping = hooks.stop()
        last = done == intervals.steps
        values: dict[str, float] = {}
        if last or done % intervals.log == 0:
            values |= window.close(done)
        if intervals.sample and (last or done % intervals.sample == 0):
            window.check(done)
            with window.stopped_clock():
                values |= hooks.sample(done, state)
        if values:
            hooks.log(done, values)
        if intervals.snapshot and (last or done % intervals.snapshot == 0):
            with window.stopped_clock():
                hooks.snapshot(done, state)
        if stopping or last or done % intervals.checkpoint == 0:
            window.check(done)
            with window.stopped_clock():
                hooks.save(done, state, position)
        if stopping and not last:
            raise StoppedError(f"stopped after step {done}")
    return state
