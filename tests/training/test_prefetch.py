"""Batches arrive in order, with the position that belongs to them; errors reach the loop."""

import threading
import time

import numpy as np
import pytest

from jaxdiff.training import loop
from jaxdiff.training.loop import Prefetch


class Counter:
    """Batches 1, 2, ... up to `last`; the position is how many were made."""

    def __init__(self, last: int = 100):
        self.made, self.last = 0, last

    def __next__(self):
        if self.made == self.last:
            raise ValueError("the disk is gone")
        self.made += 1
        return {"x": np.array([self.made])}

    def get_state(self):
        return {"made": self.made}


def test_position_is_that_of_the_batch_not_of_the_thread():
    source = Counter()
    with Prefetch(source, lambda batch: batch["x"][0], depth=3) as ahead:
        for i in range(1, 10):
            batch, position = next(ahead)
            assert batch == i
            assert position == {"made": i}
    assert source.made >= 9


def test_an_error_comes_in_its_turn():
    with Prefetch(Counter(last=2), lambda batch: batch) as ahead:
        next(ahead)
        next(ahead)
        with pytest.raises(ValueError, match="the disk is gone"):
            next(ahead)


def test_a_batch_that_does_not_come_holds_nobody(monkeypatch):
    monkeypatch.setattr(loop, "JOIN_TIMEOUT_SECONDS", 0.05)
    come, arrived = threading.Event(), []

    def place(batch):
        if batch["x"][0] > 1:
            come.wait()
        arrived.append(int(batch["x"][0]))
        return batch

    with Prefetch(Counter(), place) as ahead:
        next(ahead)
    assert arrived == [1]
    come.set()


def test_leaving_waits_for_the_batch_under_way():
    arrived = []

    def place(batch):
        time.sleep(0.1)
        arrived.append(batch)

    with Prefetch(Counter(), place) as ahead:
        next(ahead)
        time.sleep(0.02)  # the second is under way
    made = len(arrived)
    time.sleep(0.2)
    assert len(arrived) == made == 2
