"""Slots that run only while a gate is open."""

import threading

from jaxdiff.pipeline.slots import Slots

WAIT = 60  # seconds, after which a test fails rather than hangs


def gated_slots(monkeypatch):
    """An event, while which is set slots run; its `entered` is set as soon as they want to."""
    gate, run = threading.Event(), Slots.run
    gate.entered = threading.Event()

    def gated(self, steps):
        gate.entered.set()
        assert gate.wait(WAIT)
        return run(self, steps)

    monkeypatch.setattr(Slots, "run", gated)
    return gate
