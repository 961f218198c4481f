"""Which sample stands at which place of an endless training: a pure function of the place.

Places are numbered over all processes and epochs; place p belongs to global batch p // batch_size.
Nothing is remembered on the way, so a training goes on from the number of batches it has seen,
with any number of processes.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Int, NDArray
from jaxdiff.core.validate import in_range, positive

LENGTH = 1 << 40  # places; far more than a training reads
_ROUNDS = 4  # of the cipher that shuffles numbers without a table


class Place(NamedTuple):
    """The epoch, the group of samples that a batch is made of, and a position in that group."""

    epoch: int
    group: int
    position: int


class Plan:
    """The order of training over `groups`, each the items whose samples have one shape.

    An epoch has every whole batch that each group can fill, in random order over all groups, and
    the items of a group in random order: each at most once, and all but the last few, fewer than
    a batch in each group, which are others in every epoch.
    """

    def __init__(
        self, groups: Sequence[Int[NDArray, "_"]], *, batch_size: int, seed: int = 0
    ) -> None:
        positive("batch_size", batch_size)
        self._seed = int(in_range("seed", seed, 0, 2**31 - 1))
        self._groups, self._batch_size = list(groups), batch_size
        # Global batches of an epoch that come before those of each group, and all of them.
        self._before = np.cumsum([0, *(len(group) // batch_size for group in groups)])
        self.batches = int(self._before[-1])  # in an epoch
        if not self.batches:
            count = sum(len(group) for group in groups)
            raise InputError(f"data: got {count} usable items, expected at least {batch_size}")
        self._key = functools.lru_cache(maxsize=256)(self._make_key)

    def __getitem__(self, number: int) -> Place:
        batch, row = divmod(number, self._batch_size)
        epoch, turn = divmod(batch, self.batches)
        batch = self._shuffle(turn, self.batches, epoch, 0)
        group = int(np.searchsorted(self._before, batch, side="right")) - 1
        first = (batch - int(self._before[group])) * self._batch_size
        size = len(self._groups[group])
        return Place(epoch, group, self._shuffle(first + row, size, epoch, 1 + group))

    def item(self, place: Place, after: int = 0) -> int:
        """The item at `place`, or the one so many further in its group, which is a ring."""
        group = self._groups[place.group]
        return int(group[(place.position + after) % len(group)])

    def choices(self, place: Place) -> int:
        """How many items the group of `place` has."""
        return len(self._groups[place.group])

    def _shuffle(self, number: int, count: int, epoch: int, what: int) -> int:
        return grain.experimental.index_shuffle(
            number, max_index=count - 1, seed=self._key(epoch, what), rounds=_ROUNDS
        )

    def _make_key(self, epoch: int, what: int) -> int:
        return int(np.random.SeedSequence([self._seed, epoch, what]).generate_state(1)[0])


def held_out(count: int, wanted: int) -> Int[NDArray, "_"]:
    """Of `count` items those that are kept from training: evenly spread, at most a tenth."""
    few = min(wanted, count // 10)
    return np.arange(few, dtype=np.int64) * (count // few) if few else np.empty(0, np.int64)
