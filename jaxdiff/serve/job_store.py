"""Jobs that are kept: for a bounded time, and a bounded number and size of them."""

import collections
import dataclasses
import secrets
import threading
import time
from typing import Any, Literal

from jaxdiff.core.validate import non_negative, positive
from jaxdiff.generation.tickets import CANCELLED, DECODING, DONE, FAILED, SAMPLING, WAITING
from jaxdiff.serve.errors import RequestError, error_of
from jaxdiff.serve.images import OutputFormat, encode_image

JobState = Literal["waiting", "sampling", "decoding", "done", "failed", "cancelled"]


@dataclasses.dataclass(frozen=True)
class JobImage:
    """An image of a job: its file, or the sentence that says why there is none."""

    seed: int
    data: bytes | None = None
    error: str | None = None


class Job:
    """One job, from its request to its result; `generation` has its tickets until it is over."""

    def __init__(
        self, generation: Any, output_format: OutputFormat, quality: int | None = None
    ) -> None:
        self.id = secrets.token_urlsafe(18)  # that nobody can guess
        self.owner: str = generation.owner
        self.output_format: OutputFormat = output_format
        self.created = int(time.time())
        self.ended: float | None = None  # by time.monotonic
        self.images: list[JobImage] = []
        self.generation: Any = generation
        self._quality = quality
        self._final: JobState = DONE

    @property
    def state(self) -> JobState:
        """That of its images: waiting until one has a slot, and done if there is any."""
        generation = self.generation
        if generation is None:
            return self._final
        states = {ticket.state for ticket in generation.tickets}
        going = states & {WAITING, SAMPLING}
        if not going:
            return DECODING
        return WAITING if states == {WAITING} else SAMPLING

    @property
    def progress(self) -> float:
        """How much of its steps is done, 0 to 1."""
        generation = self.generation
        return 1.0 if generation is None else generation.progress

    @property
    def size(self) -> int:
        """Bytes of its images."""
        return sum(len(image.data) for image in self.images if image.data is not None)

    def cancel(self) -> None:
        """Give up the images that are not there."""
        if self.generation is not None:
            self.generation.cancel()

    def end(self) -> None:
        """Encode the images, whose tickets are all over, and drop the tickets."""
        found, states = [], set()
        for ticket in self.generation.tickets:
            states.add(ticket.state)
            seed = ticket.request.seed
            try:
                pixels = self.generation.image_of(ticket).image
                data = encode_image(pixels, self.output_format, self._quality)
                found.append(JobImage(seed, data=data))
            except Exception as error:
                found.append(JobImage(seed, error=error_of(error).message))
        ends: tuple[JobState, ...] = (CANCELLED, DONE, FAILED)
        self._final = next(state for state in ends if state in states)
        self.images, self.ended = found, time.monotonic()
        self.generation = None


class Jobs:
    """The jobs of a server."""

    def __init__(self, *, max_jobs: int = 1000, ttl: float = 600.0, max_bytes: int = 2**30) -> None:
        self._most = positive("max_jobs", max_jobs)
        self._ttl = non_negative("job_ttl", ttl)
        self._max_bytes = positive("max_job_bytes", max_bytes)
        self._jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
        self._lock = threading.Lock()

    def check_room(self) -> None:
        """RequestError with 429 if as many jobs as are kept have not ended yet."""
        with self._lock:
            going = sum(job.ended is None for job in self._jobs.values())
        if going >= self._most:
            message = f"jobs: got {going} that have not ended, expected fewer than {self._most}"
            raise RequestError(429, message, code="too_many_jobs", retry_after=self._ttl or 1)

    def add(self, job: Job) -> None:
        """Keep a job, and drop the oldest ended ones where there are too many."""
        with self._lock:
            self._jobs[job.id] = job
        self.clean()

    def get(self, number: str, owner: str) -> Job:
        """The job of an id; RequestError with 404 if there is none, or it is of another key."""
        self.clean()
        with self._lock:
            job = self._jobs.get(number)
        if job is None or job.owner != owner:
            message = f"job: got {number!a:.60}, expected the id of one that is kept"
            raise RequestError(404, message, code="job_not_found")
        return job

    def clean(self) -> None:
        """Drop ended jobs: those whose time is over, and the oldest where there are too many."""
        now = time.monotonic()
        with self._lock:
            ended = [(job.ended, job) for job in self._jobs.values() if job.ended is not None]
            total = sum(job.size for _, job in ended)
            for at, job in sorted(ended, key=lambda each: each[0]):
                if now - at > self._ttl or len(self._jobs) > self._most or total > self._max_bytes:
                    del self._jobs[job.id]
                    total -= job.size
