"""The engine: requests in, images out, for jobs and servers alike.

Requests wait in a queue, are prepared (their texts and images encoded) a little ahead, and share
slots with others of their kind, in which a compiled step advances each from a noise level of its
own. What is done is decoded while the others go on, and programs of new kinds are compiled. Four
threads do this; a ticket tells how far an image is.
"""

import contextlib
import dataclasses
import heapq
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from jaxdiff.core.timing import StageTimer, compile_s_of_thread
from jaxdiff.core.types import NDArray
from jaxdiff.generation.scheduling import Candidate, choose, chunk_length
from jaxdiff.generation.tickets import (
    CANCELLED,
    DECODING,
    DONE,
    FAILED,
    SAMPLING,
    WAITING,
    CancelledError,
    GeneratedImage,
    NonFiniteError,
    QueueFullError,
    Ticket,
)
from jaxdiff.pipeline.batches import STAGES
from jaxdiff.pipeline.nonfinite import REMEDIES, NonFiniteImageError
from jaxdiff.pipeline.output import Settings
from jaxdiff.pipeline.pipeline import Pipeline
from jaxdiff.pipeline.request import Request
from jaxdiff.pipeline.slots import PreparedImage, Slots

AHEAD = 4  # times the slots
MAX_GROUPS = 8  # of slots that are kept while nothing is in them
OFFLOADED_AHEAD = 128  # images that are prepared at a time with text encoders that are offloaded


class _Group:
    """Slots, what is prepared for them, and what a step of theirs takes."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.prepared: list[tuple[Ticket, PreparedImage]] = []  # a heap
        self.step_s: float | None = None
        self.is_compiled = False  # and its first step has run

    @property
    def oldest(self) -> float:
        """When the ticket that came first of those inside and waiting was given out."""
        tickets = [*self.slots.tickets, *(ticket for ticket, _ in self.prepared)]
        return min(ticket.times["waiting"] for ticket in tickets)


class _Decoded(NamedTuple):
    """What waits for the decoder: an image, or a preview for those who have asked for one."""

    ticket: Ticket
    image: PreparedImage
    latents: NDArray
    previews: list[Callable[[NDArray], None]] | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What latents that are decoded together have in common."""
        return self.latents.shape, self.ticket.output


class Engine:
    """Generates the images of requests of one model, as many at a time as it has slots.

    `slots` are the images of one kind that share a step, `max_waiting` the requests that wait at
    most, and `output` and `vae_tile` those of a call. `explain_failures` is whether an image that
    is not finite is generated once more, to find out since when; the others wait for that.
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        slots: int = 8,
        max_waiting: int = 256,
        output: str = "numpy",
        vae_tile: int | None = None,
        explain_failures: bool = True,
    ) -> None:
        self.pipe, self.max_waiting = pipe, max_waiting
        self._explains = explain_failures
        self._size, self._settings = slots, Settings(output=output, vae_tile=vae_tile)
        self._preparer = pipe.preparer()
        self._ahead = AHEAD * slots  # prepared images that wait for a slot
        # Programs of a mesh exchange data, in an order that all devices have to share; and encoders
        # that are offloaded have no room beside a step. Then the threads take turns.
        offloads, on_mesh = pipe.stages.offloads_text, pipe.mesh is not None
        self._turn: Any = threading.Lock() if offloads or on_mesh else contextlib.nullcontext()
        if offloads:  # each time they come to the devices, for as many as can be
            self._ahead = max(self._ahead, OFFLOADED_AHEAD)
            self.max_waiting = max(max_waiting, OFFLOADED_AHEAD)
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []  # a heap
        self._groups: dict[Hashable, _Group] = {}
        self._in_hand: dict[bool, _Group] = {}  # that images enter, or that are advanced
        self._prepared = 0  # images in all groups that wait for a slot
        self._preparing = 0
        self._decoding: deque[_Decoded] = deque()
        self._in_decoder = 0
        self._given_out = 0
        self._live: set[Ticket] = set()  # those that are not over
        self._closing = self._stopped = False
        self._broken: BaseException | None = None
        self.timer = StageTimer(STAGES, compile_s_of_thread)  # each stage has a thread of its own
        names = {
            "prepare": self._prepare,
            "begin": lambda: self._sample(is_compiled=False),
            "sample": lambda: self._sample(is_compiled=True),
            "decode": self._decode,
        }
        self._threads = [
            threading.Thread(target=self._guarded, args=(own,), name=f"engine-{name}", daemon=True)
            for name, own in names.items()
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(drain=kind is None)

    @property
    def waiting(self) -> int:
        """How many requests have no slot yet."""
        return len(self._waiting) + self._preparing + self._prepared

    @property
    def running(self) -> int:
        """How many images are in slots or in the decoder."""
        with self._changed:
            inside = sum(len(group.slots.tickets) for group in self._groups.values())
            return inside + len(self._decoding) + self._in_decoder

    @property
    def slots_in_use(self) -> int:
        """How many slots have an image, in all groups."""
        with self._changed:
            return sum(len(group.slots.tickets) for group in self._groups.values())

    @property
    def sample_s(self) -> float:
        """For how many seconds devices have advanced images."""
        return self.timer.timings()["sample_s"]

    @property
    def broken(self) -> bool:
        """Whether an error that nobody expected has ended it."""
        return self._broken is not None

    def position(self, ticket: Ticket) -> int | None:
        """How many requests without a slot come before a ticket; None once it has one."""
        if ticket.state != WAITING:
            return None
        return sum(each.state == WAITING and each < ticket for each in list(self._live))

    def submit(
        self,
        request: Request,
        *,
        priority: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
        block: bool = True,
        output: str | None = None,
    ) -> Ticket:
        """Take a request in; its ticket has the image in the end, as `output` if that is given.

        Where too many wait, it waits for a place itself, or else (`block` False) raises
        QueueFullError. `on_progress` is called from the engine's thread and must be quick. Raises
        InputError for a request that the model cannot serve, and CancelledError after `close`.
        """
        self.pipe.check([request])
        with self._changed:
            while self.waiting >= self.max_waiting and not self._closing:
                if not block:
                    raise QueueFullError(f"{self.waiting} requests are waiting already")
                self._changed.wait()
            self._check_open()
            self._given_out += 1
            ticket = Ticket(
                request,
                priority=priority,
                number=self._given_out,
                on_progress=on_progress,
                output=output,
            )
            self._live.add(ticket)
            heapq.heappush(self._waiting, ticket)
            ticket.future.add_done_callback(lambda _: self._forget(ticket))
            self._changed.notify_all()
        return ticket

    def _forget(self, ticket: Ticket) -> None:
        """Let go of a ticket that is over; if it was waiting, another one has its place."""
        with self._changed:
            self._live.discard(ticket)
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
            self._changed.notify_all()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take nothing in any more, and end: with `drain` when all images are there.

        Otherwise, and after `timeout` seconds, tickets that are not done are cancelled. Returns
        whether all were done.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if drain:
                self._changed.wait_for(lambda: self._stopped or not self._live, timeout)
            done, self._stopped = not self._live and self._broken is None, True
            self._changed.notify_all()
        for ticket in list(self._live):
            ticket.end(CANCELLED, CancelledError("the engine was closed"))
        for thread in self._threads:
            thread.join()
        return done

    def fail(self, error: BaseException) -> None:
        """End all tickets with an error after which no image is of use, and take in no more."""
        with self._changed:
            self._broken, self._closing, self._stopped = error, True, True
            self._changed.notify_all()
        for ticket in list(self._live):
            ticket.end(FAILED, error)

    def _check_open(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._closing:
            raise CancelledError("the engine is closed")

    def _guarded(self, loop: Callable[[], None]) -> None:
        """Run the loop of a thread; an error that nobody expects ends all tickets with it."""
        try:
            loop()
        except BaseException as error:
            self.fail(error)

    def _prepare(self) -> None:
        """The thread that encodes what requests begin with."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._room())
                if self._stopped:
                    return
                room = self._room()
                taken = [heapq.heappop(self._waiting) for _ in range(room)]
                self._preparing = len(taken)
            with self._turn, self.timer("encode_s"):
                images = self._prepared_images([each for each in taken if not each.future.done()])
            with self._changed:
                for ticket, image in images:
                    group = self._group(image.key)
                    heapq.heappush(group.prepared, (ticket, image))
                self._prepared += len(images)
                self._preparing = 0
                self._changed.notify_all()

    def _room(self) -> int:
        """How many waiting requests are to be prepared now: none with enough of them ahead.

        One that comes before some of those still is.
        """
        if self.pipe.stages.offloads_text:  # all at once
            return 0 if self._prepared else min(len(self._waiting), self._ahead)
        if not self._waiting or self._prepared < self._ahead:
            return min(len(self._waiting), self._size, self._ahead - self._prepared)
        first = self._waiting[0].priority
        return int(any(t.priority > first for g in self._groups.values() for t, _ in g.prepared))

    def _prepared_images(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, PreparedImage]]:
        """The prepared images of those that can be; the others' tickets end with the reason."""
        try:
            images = self._preparer.prepare([each.request for each in tickets], self._settings)
            return list(zip(tickets, images, strict=True))
        except Exception as error:
            if len(tickets) == 1:
                tickets[0].end(FAILED, error)
                return []
        return [pair for ticket in tickets for pair in self._prepared_images([ticket])]

    def _group(self, key: Hashable) -> _Group:
        """The group of a key, a new one if need be; old ones without images make room."""
        if key not in self._groups:
            in_hand = list(self._in_hand.values())
            groups = ((k, g) for k, g in self._groups.items() if g not in in_hand)
            idle = [k for k, g in groups if not (g.prepared or g.slots.tickets)]
            for old in idle[: max(0, len(self._groups) + 1 - MAX_GROUPS)]:
                del self._groups[old]
            self._groups[key] = _Group(Slots(self.pipe.stages, self._size))
        return self._groups[key]

    def _sample(self, *, is_compiled: bool) -> None:
        """The thread that advances images, or the one that begins with new kinds of them.

        Their programs are compiled there, while images of other kinds go on.
        """
        while True:
            with self._changed:
                self._in_hand.pop(is_compiled, None)
                self._changed.wait_for(lambda: self._stopped or self._busy_groups(is_compiled))
                if self._stopped:
                    return
                self._in_hand[is_compiled] = group = self._next_group(is_compiled)
                entering = self._entering(group)
                is_open = not self._closing
                self._changed.notify_all()
            try:
                if entering:
                    with self._turn, self.timer("sample_s"):
                        group.slots.admit(entering)
                    for ticket, _ in entering:
                        ticket.enter(SAMPLING)
                if group.slots.tickets:
                    self._advance(group, is_open=is_open)
            except Exception as error:
                if group.step_s is not None:
                    raise
                self._give_up(group, error)
            with self._changed:
                group.is_compiled = group.step_s is not None
                self._changed.notify_all()

    def _give_up(self, group: _Group, error: Exception) -> None:
        """End the tickets of a group whose first step cannot be compiled or run; others go on."""
        with self._changed:
            self._groups = {key: each for key, each in self._groups.items() if each is not group}
            self._prepared -= len(group.prepared)
            self._changed.notify_all()
        for ticket in [*group.slots.tickets, *(ticket for ticket, _ in group.prepared)]:
            ticket.end(FAILED, error)

    def _busy_groups(self, is_compiled: bool) -> list[_Group]:
        groups = [g for g in self._groups.values() if g.is_compiled is is_compiled]
        return [g for g in groups if g.prepared or g.slots.tickets]

    def _next_group(self, is_compiled: bool) -> _Group:
        groups = self._busy_groups(is_compiled)
        candidates = [Candidate(g.slots, len(g.prepared), g.oldest) for g in groups]
        return groups[choose(candidates) or 0]

    def _entering(self, group: _Group) -> list[tuple[Ticket, PreparedImage]]:
        """What enters the free slots of a group; who gave up leaves first."""
        for ticket in group.slots.tickets:
            if ticket.future.done():
                group.slots.remove(ticket)
        entering: list[tuple[Ticket, PreparedImage]] = []
        while group.prepared and len(entering) < group.slots.free:
            ticket, image = heapq.heappop(group.prepared)
            self._prepared -= 1
            if not ticket.future.done():
                entering.append((ticket, image))
        return entering

    def _advance(self, group: _Group, *, is_open: bool) -> None:
        """Run a chunk of a group's slots, and hand on what is done and what is to be shown."""
        slots, steps = group.slots, chunk_length(group.slots, group.step_s, is_open=is_open)
        wanted = [ticket.steps_to_preview for ticket in slots.tickets]
        steps = min([steps, *(step for step in wanted if step)])
        with self._turn, self.timer("sample_s"):
            seconds = slots.run(steps)
        group.step_s = seconds / steps
        for ticket in slots.tickets:
            ticket.advance(*slots.position(ticket))
        with self._turn:
            shown = [
                _Decoded(ticket, image, slots.denoised(ticket), ticket.take_previews())
                for ticket, image in slots.seated
                if ticket.steps_to_preview == 0 and ticket.progress[0] < ticket.progress[1]
            ]
            finished = [_Decoded(*entry) for entry in slots.take_finished()]
        for ticket, *_ in finished:
            ticket.enter(DECODING)
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._decoding) < self._ahead)
            self._decoding.extend([*shown, *finished])
            self._changed.notify_all()

    def _decode(self) -> None:
        """The thread that decodes latents and ends tickets."""
        most = max(self._size, self.pipe.stages.num_shards)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._decoding)
                if self._stopped:
                    return
                kind = self._decoding[0].kind
                alike = [each for each in self._decoding if each.kind == kind][:most]
                taken = {id(entry) for entry in alike}
                self._decoding = deque(each for each in self._decoding if id(each) not in taken)
                self._in_decoder = len(alike)
                self._changed.notify_all()
            settings = self._settings
            if (output := alike[0].ticket.output) is not None:
                settings = dataclasses.replace(settings, output=output)
            try:
                with self._turn, self.timer("decode_s"):
                    decoded = self._preparer.decode_alike(
                        [(entry.image, entry.latents) for entry in alike], settings
                    )
            except Exception as error:  # such as an image for which there is no memory
                for entry in alike:
                    entry.ticket.end(FAILED, error)
                alike, decoded = [], []
            for entry, (pixels, finite) in zip(alike, decoded, strict=True):
                ticket, image, _, previews = entry
                if previews is not None:
                    ticket.show(pixels, previews)
                elif finite:
                    ticket.end(DONE, GeneratedImage(pixels, image.request, ticket.seconds()))
                else:
                    ticket.end(FAILED, NonFiniteError(self._why(image.request)))
            with self._changed:
                self._in_decoder = 0
                self._changed.notify_all()

    def _why(self, request: Request) -> str:
        """Since when an image is not finite; it is generated once more to find out."""
        if not self._explains:
            return f"got numbers that are not finite, {REMEDIES}"
        try:
            with self._turn:
                self.pipe.generate([request], output="latent")
            where = "in the decoder"
        except NonFiniteImageError as error:
            where = error.output.failures[0]
        return f"got numbers that are not finite {where}, {REMEDIES}"
