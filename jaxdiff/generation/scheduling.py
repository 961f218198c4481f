"""Which slots run next, and for how many steps."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from jaxdiff.pipeline.slots import Slots

PATIENCE_S = 5.0  # a wait of so long counts as much as all slots of a group
BUSY_CHUNK_S = 0.5  # how long a chunk runs at most where nobody can enter before it ends
OPEN_CHUNK_S = 0.1  # and where slots are empty, so that who comes enters soon


class Candidate(NamedTuple):
    """A group of slots with what is in them and what waits for them."""

    slots: Slots
    waiting: int  # images that could enter
    oldest: float  # when the image that waits longest came, by time.monotonic


def choose(candidates: Sequence[Candidate]) -> int | None:
    """The number of the group that runs next: full ones first, unless somebody waits long."""
    if not candidates:
        return None
    now = time.monotonic()

    def worth(candidate: Candidate) -> float:
        slots = candidate.slots
        filled = min(slots.size - slots.free + candidate.waiting, slots.size) / slots.size
        return filled + (now - candidate.oldest) / PATIENCE_S

    return max(range(len(candidates)), key=lambda i: worth(candidates[i]))


def chunk_length(slots: Slots, step_s: float | None, *, is_open: bool) -> int:
    """How many steps to run: until an image is done, or the chunk's time is over.

    `step_s` is what a step takes (None: not known yet); `is_open` says whether others may come.
    """
    if step_s is None:
        return 1
    limit = OPEN_CHUNK_S if is_open and slots.free else BUSY_CHUNK_S
    return max(1, min(min(slots.steps_left), int(limit / max(step_s, 1e-6))))
