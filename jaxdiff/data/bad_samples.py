"""Bad samples of a data set: counted by reason, and fatal only beyond a share of it."""

import threading
import warnings
from collections import Counter

from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range

MIN_SAMPLES_FOR_LIMIT = 10  # up to as many bad samples are never fatal


class BadSampleError(Exception):
    """An item cannot be used; the message is the reason, in words that many items share.

    `where` names a file that a warning shall point out.
    """

    def __init__(self, reason: str, *, where: str = "") -> None:
        super().__init__(reason)
        self.where = where


class BadSampleCounter:
    """Counts by reason of items that could not be used, safe for threads.

    `limit` is the share of the items seen above which `broken` raises InputError, once more than
    `floor` are broken.
    """

    def __init__(self, limit: float = 0.05, floor: int = MIN_SAMPLES_FOR_LIMIT) -> None:
        self.limit = in_range("max_bad_fraction", limit, 0, 1)
        self.floor = in_range("floor", floor, 0, float("inf"))
        self._lock = threading.Lock()
        self._seen = 0
        self._reasons: Counter[str] = Counter()

    def seen(self, count: int = 1) -> None:
        """So many more items were looked at, usable or not."""
        with self._lock:
            self._seen += count

    def broken(self, reason: str, count: int = 1, *, where: str = "") -> None:
        """So many of them are not usable; `where` names a file that a warning shall point out."""
        with self._lock:
            self._reasons[reason] += count
            total = self._reasons.total()
        if where:
            warnings.warn(f"{where}: {reason}, skipped", stacklevel=2)
        if total > self.floor and total > self.limit * self._seen:
            raise InputError(
                f"data: got {total} bad samples among {self._seen} ({self.reasons()}), "
                f"expected at most the fraction {self.limit:g} (data.max_bad_fraction)"
            )

    def reasons(self) -> str:
        """The counts in words, the most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())

    def counts(self) -> dict[str, int]:
        """Reason -> number of items, only what occurred."""
        with self._lock:
            return dict(sorted(self._reasons.items()))
