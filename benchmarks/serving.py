"""Slots against static batches: throughput and latency of one trace of requests.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 PYTHONPATH=. \
        python benchmarks/serving.py --requests 160 --output runs/serving.json

The trace is drawn once: numbers of steps from 4 to 50, three quarters of 128x128 pixels and one of
96x96, prompts, seeds and scales of their own, and exponential times between arrivals. Two servers
have it in turn, on the same compiled programs and as many images at a time:

- *slots* is the engine of `generate.py` and `jaxdiff serve`;
- *static* takes the requests that wait in their order, up to a batch of one size, runs the batch
  until its last image is done, and decodes it.

First all requests are there at once: images a second. Then they arrive at a share of the static
server's throughput: median and 95th percentile of the time from arrival to pixels. Each of it is
run --repeats times, in turn; the table has the medians.
"""

import argparse
import json
import pathlib
import statistics
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np

import jaxdiff
from jaxdiff.generation.engine import Engine
from jaxdiff.pipeline.request import Request

PROMPTS = (
    "a small red circle above a large blue square",
    "a large green star",
    "a small cyan ring left of a large black cross",
    "a large yellow triangle on a grey background",
)
SIZES = ((128, 0.75), (96, 0.25))


class Arrival(NamedTuple):
    """A request of the trace, and the time between its arrival and the one before, at rate 1."""

    request: Request
    gap: float


def make_trace(pipe: Any, count: int, seed: int) -> list[Arrival]:
    """The trace of `count` requests."""
    rng, trace = np.random.default_rng(seed), []
    sides, fractions = zip(*SIZES, strict=True)
    for number in range(count):
        side = int(rng.choice(sides, p=fractions))
        (request,) = pipe.resolve(
            PROMPTS[rng.integers(len(PROMPTS))],
            seed=number,
            steps=int(rng.integers(4, 51)),
            guidance_scale=float(rng.uniform(1.5, 5)),
            height=side,
            width=side,
        )
        trace.append(Arrival(request, float(rng.exponential())))
    return trace


class Static:
    """A server of batches that run until the last image is done."""

    def __init__(self, pipe: Any, size: int) -> None:
        self._pipe, self._size = pipe, size
        self._queue: deque[tuple[Request, Any]] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def submit(self, request: Request, done: Any) -> None:
        """Take a request in; `done` is called when its image is there."""
        with self._changed:
            self._queue.append((request, done))
            self._changed.notify()

    def close(self) -> None:
        """End when all images are there."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                key, batch, others = self._queue[0][0].batch_key, [], deque()
                for each in self._queue:
                    fits = each[0].batch_key == key and len(batch) < self._size
                    (batch if fits else others).append(each)
                self._queue = others
            self._pipe.generate(
                [request for request, _ in batch], batch_size=self._size, output="numpy"
            )
            for _, done in batch:
                done()


class Slots:
    """The engine, with the same interface."""

    def __init__(self, pipe: Any, size: int) -> None:
        self._engine = Engine(pipe, slots=size, max_waiting=10**6)

    def submit(self, request: Request, done: Any) -> None:
        """Take a request in; `done` is called when its image is there."""
        self._engine.submit(request).future.add_done_callback(lambda _: done())

    def close(self) -> None:
        """End when all images are there."""
        self._engine.close()


SERVERS = {"static": Static, "slots": Slots}


def run(server: Any, trace: list[Arrival], rate: float | None) -> tuple[float, list[float]]:
    """Images a second, and seconds of each image; `rate` requests come a second, None: at once."""
    latencies, began = [], time.perf_counter()
    for request, gap in trace:
        if rate is not None:
            time.sleep(gap / rate)
        arrived = time.perf_counter()
        server.submit(request, lambda at=arrived: latencies.append(time.perf_counter() - at))
    server.close()
    return len(trace) / (time.perf_counter() - began), latencies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    pipe: Any = jaxdiff.load(options.model)
    trace = make_trace(pipe, options.requests, options.seed)
    for server in SERVERS.values():  # compiles what both need
        run(server(pipe, options.slots), trace[:8], None)
    found: dict[str, Any] = {"device": pipe.device_name, "requests": len(trace)}
    rates: dict[str, list[float]] = {name: [] for name in SERVERS}
    for _ in range(options.repeats):
        for name, server in SERVERS.items():
            rates[name].append(run(server(pipe, options.slots), trace, None)[0])
    found["images_per_s"] = {name: statistics.median(own) for name, own in rates.items()}
    for load in options.loads:
        own: dict[str, list[list[float]]] = {name: [] for name in SERVERS}
        for _ in range(options.repeats):
            for name, server in SERVERS.items():
                rate = load * found["images_per_s"]["static"]
                own[name].append(run(server(pipe, options.slots), trace, rate)[1])
        found[f"load {load:g}"] = {
            f"{name} p{q}": statistics.median(float(np.percentile(each, q)) for each in runs)
            for name, runs in own.items()
            for q in (50, 95)
        }
        print(json.dumps(found), flush=True)
    print(f"| {found['device']} | static | slots | |\n|---|---|---|---|")
    static, slots = (found["images_per_s"][name] for name in SERVERS)
    print(f"| images a second | {static:.2f} | {slots:.2f} | {slots / static:.2f} times |")
    for load in options.loads:
        own_s = found[f"load {load:g}"]
        for q in (50, 95):
            a, b = own_s[f"static p{q}"], own_s[f"slots p{q}"]
            print(f"| p{q} at {load:.0%} load | {a:.2f} s | {b:.2f} s | {b / a:.2f} times |")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
