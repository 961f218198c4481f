"""The order of the samples of an endless training: a pure function of the position.

Positions are numbered over all processes and epochs; position p belongs to global batch
p // batch_size. There is no state, so a training resumes from the number of batches it has seen,
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

LENGTH = 1 << 40  # positions; far more than a training reads
_ROUNDS = 4  # of the cipher that shuffles numbers without a table


class SamplePosition(NamedTuple):
    """The epoch, the group of samples that a batch is made of, and a position in that group."""

    epoch: int
    group: int
    position: int


class IndexSampler:
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

    def __getitem__(self, number: int) -> SamplePosition:
        batch, row = divmod(number, self._batch_size)
        epoch, turn = divmod(batch, self.batches)
        group, batch = self._batch(epoch, turn)
        return SamplePosition(epoch, group, self._position(epoch, group, batch, row))

    def item(self, position: SamplePosition, after: int = 0) -> int:
        """The item at `position`, or `after` items further in its group, which is a ring."""
        group = self._groups[position.group]
        return int(group[(position.position + after) % len(group)])

    def choices(self, position: SamplePosition) -> int:
        """The number of items in the group of `position`."""
        return len(self._groups[position.group])

    def _batch(self, epoch: int, turn: int) -> tuple[int, int]:
        """The group whose turn it is in an epoch, and which of its batches that is."""
        batch = self._shuffle(turn, self.batches, epoch, 0)
        group = int(np.searchsorted(self._before, batch, side="right")) - 1
        return group, batch - int(self._before[group])

    def _position(self, epoch: int, group: int, batch: int, row: int) -> int:
        """That of a row of a group's batch in the group."""
        size = len(self._groups[group])
        return self._shuffle(batch * self._batch_size + row, size, epoch, 1 + group)

    def _shuffle(self, number: int, count: int, *what: int) -> int:
        return grain.experimental.index_shuffle(
            number, max_index=count - 1, seed=self._key(*what), rounds=_ROUNDS
        )

    def _make_key(self, *what: int) -> int:
        return int(np.random.SeedSequence([self._seed, *what]).generate_state(1)[0])


class BlockShuffleSampler(IndexSampler):
    """The same for items that are stored in runs, of which few are read from at the same time.

    `starts` are the first items of the runs, and the items of a group ascend. The runs of a group
    come in random order, and so do the items in each. A batch is of `lanes` parts of one size;
    each part goes along a stretch of its own of that order, so a batch is of so many runs, and a
    process that has some of the parts reads their runs alone.
    """

    def __init__(
        self,
        groups: Sequence[Int[NDArray, "_"]],
        *,
        batch_size: int,
        starts: Int[NDArray, "_"],
        lanes: int,
        seed: int = 0,
    ) -> None:
        super().__init__(groups, batch_size=batch_size, seed=seed)
        if batch_size % lanes:
            raise InputError(f"lanes: got {lanes}, expected a divisor of {batch_size}")
        self._part = batch_size // lanes
        # Positions of a group at which its runs begin, and its end.
        runs = [np.searchsorted(starts, group, side="right") for group in groups]
        self._begins = [
            np.append(np.flatnonzero(np.diff(run, prepend=-1)), len(run)) for run in runs
        ]
        self._key = functools.lru_cache(maxsize=1 << 14)(self._make_key)
        self._turns = functools.lru_cache(maxsize=2)(self._make_turns)
        self._order = functools.lru_cache(maxsize=2 * len(groups))(self._make_order)

    def _batch(self, epoch: int, turn: int) -> tuple[int, int]:
        groups, batches = self._turns(epoch)
        return int(groups[turn]), int(batches[turn])

    def _position(self, epoch: int, group: int, batch: int, row: int) -> int:
        lane, place = divmod(row, self._part)
        batches = int(self._before[group + 1] - self._before[group])
        place += (lane * batches + batch) * self._part
        order, ends = self._order(epoch, group)
        turn = int(np.searchsorted(ends, place, side="right"))
        run = int(order[turn])
        first, after = self._begins[group][run : run + 2].tolist()
        inside = place - int(ends[turn]) + after - first
        return first + self._shuffle(inside, after - first, epoch, 1 + group, run)

    def _make_turns(self, epoch: int) -> tuple[Int[NDArray, "n"], Int[NDArray, "n"]]:
        """Of each turn of an epoch the group, and which of its batches: one after the other."""
        counts = np.diff(self._before)
        groups = np.repeat(np.arange(len(counts)), counts)[self._permuted(self.batches, epoch, 0)]
        batches = np.empty_like(groups)
        for group, count in enumerate(counts):
            batches[groups == group] = np.arange(count)
        return groups, batches

    def _make_order(self, epoch: int, group: int) -> tuple[Int[NDArray, "n"], Int[NDArray, "n"]]:
        """The runs of a group in the order of an epoch, and how many items have come with each."""
        lengths = np.diff(self._begins[group])
        order = self._permuted(len(lengths), epoch, 1 + group)
        return order, np.cumsum(lengths[order])

    def _permuted(self, count: int, *what: int) -> Int[NDArray, "n"]:
        """The numbers below `count` in random order, the same in every version of numpy."""
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, *what])).random_raw(count)
        return np.argsort(bits, kind="stable")


def validation_indices(
    count: int, num_validation: int, num_blocks: int | None = None
) -> Int[NDArray, "_"]:
    """The indices of the validation split among `count` items: at most a tenth of them.

    They are evenly spread, one by one or, for items stored in blocks, in `num_blocks` runs.
    """
    few = min(num_validation, count // 10)
    if not few:
        return np.empty(0, np.int64)
    num_blocks = min(num_blocks or few, few)
    firsts = np.arange(num_blocks, dtype=np.int64) * (count // num_blocks)
    return (firsts[:, None] + np.arange(-(-few // num_blocks))).ravel()[:few]
