"""Metrics in Prometheus' format. Labels have a fixed set of values, whatever clients send."""

import itertools
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from jaxdiff.generation.engine import Engine
from jaxdiff.generation.tickets import DECODING, SAMPLING, WAITING, Ticket

Reason = Literal["done", "failed", "not_finite", "cancelled", "disconnected", "error"]
REASONS: tuple[Reason, ...] = (
    *("done", "failed", "not_finite", "cancelled", "disconnected", "error"),
)
OTHER = "other"  # the route of paths that are none, and the status of what is no number
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second line for each counter, which few read
        self.registry = own = CollectorRegistry()
        self.running = Gauge("jaxdiff_requests_running", "Images being generated", registry=own)
        self.waiting = Gauge("jaxdiff_requests_waiting", "Images without a slot", registry=own)
        self.slots = Gauge("jaxdiff_slots", "Slots of one kind of images", registry=own)
        self.slots_in_use = Gauge(
            "jaxdiff_slots_in_use", "Slots with an image, of all kinds", registry=own
        )
        self.latency = Histogram(
            "jaxdiff_request_latency_seconds",
            "From the arrival of a request to its image",
            buckets=SECONDS,
            registry=own,
        )
        self.queue_time = Histogram(
            "jaxdiff_request_queue_seconds",
            "From the arrival of a request to its first step",
            buckets=SECONDS,
            registry=own,
        )
        self.stages = Histogram(
            "jaxdiff_stage_seconds",
            "Of an image in each stage",
            ["stage"],
            buckets=SECONDS,
            registry=own,
        )
        self.finished = Counter(
            "jaxdiff_requests_finished", "Images by how they ended", ["reason"], registry=own
        )
        self.rejected = Counter(
            "jaxdiff_requests_rejected", "Requests that found the queue full", registry=own
        )
        self.images = Counter("jaxdiff_images", "Images generated", registry=own)
        self.pixels = Counter("jaxdiff_image_pixels", "Pixels of these images", registry=own)
        self.steps = Counter("jaxdiff_denoising_steps", "Steps of these images", registry=own)
        self.sampling = Gauge(
            "jaxdiff_sampling_seconds_total", "In which the devices advanced images", registry=own
        )
        self.responses = Counter(
            "jaxdiff_http_responses", "Answers by route and status", ["route", "status"],
            registry=own,
        )  # fmt: skip
        for reason in REASONS:
            self.finished.labels(reason)
        for stage in (WAITING, SAMPLING, DECODING):
            self.stages.labels(stage)

    def finish(self, ticket: Ticket, reason: Reason) -> None:
        """Note that a ticket is over."""
        self.finished.labels(reason).inc()
        marks = list(ticket.times.items())
        start, end = marks[0][1], marks[-1][1]
        began = ticket.times.get(SAMPLING)
        if began is not None:
            self.queue_time.observe(began - start)
        if reason != "done":
            return
        self.latency.observe(end - start)
        for (stage, at), (_, following) in itertools.pairwise(marks):
            self.stages.labels(stage).observe(following - at)
        self.images.inc()
        self.pixels.inc(ticket.request.height * ticket.request.width)
        self.steps.inc(ticket.progress[1])

    def answer(self, route: str, status: int) -> None:
        """Count an answer; `route` is a path of the schema or OTHER."""
        self.responses.labels(route, str(status)).inc()

    def page(self, engine: Engine | None, slots: int) -> bytes:
        """The page that Prometheus reads."""
        self.slots.set(slots)
        self.running.set(0 if engine is None else engine.running)
        self.waiting.set(0 if engine is None else engine.waiting)
        self.slots_in_use.set(0 if engine is None else engine.slots_in_use)
        self.sampling.set(0 if engine is None else engine.sample_s)
        return generate_latest(self.registry)
