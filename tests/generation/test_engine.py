"""The engine: its queue, its slots and its threads, on a tiny model."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
import tiny
from gated_slots import WAIT, gated_slots

import jaxdiff
from jaxdiff.core.errors import InputError
from jaxdiff.generation import engine as engine_module
from jaxdiff.generation.engine import Engine
from jaxdiff.generation.tickets import (
    CancelledError,
    NonFiniteError,
    QueueFullError,
)
from jaxdiff.pipeline.programs import CompiledFunction
from jaxdiff.pipeline.slots import ImagePreparer, Slots


def request(pipe, seed=0, **options):
    return pipe.resolve("a blue star", **{"seed": seed, "steps": 3, **options})[0]


@pytest.fixture
def gate(monkeypatch):
    """Slots run only while it is set; `gate.entered` is set as soon as they want to."""
    gate = gated_slots(monkeypatch)
    yield gate
    gate.set()


def test_requests_of_many_kinds_get_the_images_of_a_call(pipe):
    requests = [
        request(pipe, seed=i, steps=2 + i % 4, height=(16, 32)[i % 2], guidance_scale=1.0 + i % 3)
        for i in range(12)
    ]
    steps = []
    with Engine(pipe, slots=3) as engine:
        tickets = [
            engine.submit(each, on_progress=lambda *progress: steps.append(progress))
            for each in requests
        ]
        images = [ticket.result(WAIT) for ticket in tickets]
    for each, own in zip(requests, images, strict=True):
        plain = pipe.generate([each], output="numpy").images[0]
        assert own.request == each
        assert np.abs(own.image.astype(int) - plain).max() <= 1
    assert {ticket.state for ticket in tickets} == {"done"}
    assert {"waiting", "sampling", "decoding"} <= images[0].seconds.keys()
    assert max(steps) == (5, 5)
    assert min(steps)[0] >= 1


def test_latents_are_those_of_a_call(pipe):
    each = request(pipe, sampler="euler", denoising_end=0.5)
    with Engine(pipe, slots=2, output="latent") as engine:
        latents = engine.submit(each).result(WAIT).image
    plain = pipe.generate([each], output="latent").images[0]
    np.testing.assert_allclose(latents, plain, rtol=1e-5, atol=1e-5)


def test_a_full_queue_refuses_or_waits(pipe, gate):
    with Engine(pipe, slots=1, max_waiting=2) as engine:
        first = engine.submit(request(pipe))
        assert gate.entered.wait(WAIT)
        others = [engine.submit(request(pipe, seed=i)) for i in (1, 2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            engine.submit(request(pipe, seed=3), block=False)
        threading.Timer(0.05, gate.set).start()
        others.append(engine.submit(request(pipe, seed=3)))  # waits for a place
        assert all(ticket.result(WAIT).image.shape == (16, 16, 3) for ticket in [first, *others])
        assert (engine.waiting, engine.running) == (0, 0)


def test_who_gives_up_leaves_the_queue_or_the_slot(pipe, gate):
    with Engine(pipe, slots=1) as engine:
        running, waiting, other = (engine.submit(request(pipe, seed=i)) for i in range(3))
        assert gate.entered.wait(WAIT)
        assert running.cancel()
        assert waiting.cancel()
        gate.set()
        assert other.result(WAIT).request.seed == 2
        for ticket in (running, waiting):
            with pytest.raises(CancelledError, match="cancelled"):
                ticket.result(WAIT)
        assert not other.cancel()
        assert other.state == "done"


def test_lower_numbers_come_first(pipe, gate):
    done = []
    with Engine(pipe, slots=1) as engine:
        engine.submit(request(pipe))
        assert gate.entered.wait(WAIT)
        for seed, priority in ((1, 5), (2, 0), (3, 0), (4, -1)):
            ticket = engine.submit(request(pipe, seed=seed), priority=priority)
            ticket.future.add_done_callback(lambda own: done.append(own.result().request.seed))
        with engine._changed:
            is_settled = lambda: not (engine._preparing or engine._room())  # noqa: E731
            assert engine._changed.wait_for(is_settled, WAIT)
        gate.set()
    assert done == [4, 2, 3, 1]


def test_a_request_that_cannot_be_served_fails_alone(pipe, monkeypatch):
    prepare = ImagePreparer.prepare

    def checked(self, requests, settings):
        if any(each.seed == 1 for each in requests):
            raise InputError("image: got no such file")
        return prepare(self, requests, settings)

    monkeypatch.setattr(ImagePreparer, "prepare", checked)
    with Engine(pipe, slots=3) as engine:
        tickets = [engine.submit(request(pipe, seed=i)) for i in range(3)]
        with pytest.raises(InputError, match="no such file"):
            tickets[1].result(WAIT)
        assert all(tickets[i].result(WAIT).image.any() for i in (0, 2))
        with pytest.raises(InputError, match="height: got 17"):
            engine.submit(dataclasses.replace(request(pipe), height=17))


@pytest.fixture
def not_finite(monkeypatch):
    """Images with seed 1 are not finite."""
    decode = ImagePreparer.decode_alike

    def broken(self, images, settings):
        found = decode(self, images, settings)
        return [
            (pixels, finite and image.request.seed != 1)
            for (pixels, finite), (image, _) in zip(found, images, strict=True)
        ]

    monkeypatch.setattr(ImagePreparer, "decode_alike", broken)


def test_an_image_that_is_not_finite_fails_alone(pipe, not_finite):
    with Engine(pipe, slots=3) as engine:
        tickets = [engine.submit(request(pipe, seed=i)) for i in range(3)]
        with pytest.raises(NonFiniteError, match="not finite in the decoder"):
            tickets[1].result(WAIT)
        assert all(tickets[i].result(WAIT).image.any() for i in (0, 2))


def test_a_kind_that_cannot_be_compiled_fails_alone(pipe):
    with Engine(pipe, slots=2) as engine:
        fine = engine.submit(request(pipe))
        broken = [engine.submit(request(pipe, i, guidance="autoguidance")) for i in range(3)]
        for ticket in broken:
            with pytest.raises(InputError, match="guidance_model: got none"):
                ticket.result(WAIT)
        assert fine.result(WAIT).image.any()
        assert engine.submit(request(pipe, seed=1)).result(WAIT).image.any()
        assert (engine.waiting, engine.running, engine.broken) == (0, 0, False)


def test_what_breaks_the_preparation_of_a_request_ends_it_alone(pipe, monkeypatch):
    prepare = ImagePreparer.prepare

    def broken(self, requests, settings):
        if any(each.seed == 1 for each in requests):
            raise UnicodeError("no such letter")
        return prepare(self, requests, settings)

    monkeypatch.setattr(ImagePreparer, "prepare", broken)
    with Engine(pipe, slots=3) as engine:
        tickets = [engine.submit(request(pipe, seed=i)) for i in range(3)]
        with pytest.raises(UnicodeError, match="no such letter"):
            tickets[1].result(WAIT)
        assert all(tickets[i].result(WAIT).image.any() for i in (0, 2))


def test_who_gives_up_makes_room_in_the_queue(pipe, gate):
    with Engine(pipe, slots=1, max_waiting=4) as engine:
        running = engine.submit(request(pipe))
        assert gate.entered.wait(WAIT)
        others = [engine.submit(request(pipe, seed=i, height=32)) for i in range(4)]
        assert sorted(engine.position(ticket) for ticket in others) == [0, 1, 2, 3]
        assert engine.position(running) is None
        assert engine.slots_in_use == 1
        with pytest.raises(QueueFullError):
            engine.submit(request(pipe, seed=9), block=False)
        others[-1].cancel()
        last = engine.submit(request(pipe, seed=9), block=False)
        gate.set()
        assert last.result(WAIT).image.any()


def test_previews_after_given_steps_and_other_forms(pipe):
    shown = []
    with Engine(pipe, slots=2) as engine:
        ticket = engine.submit(request(pipe, steps=6))
        for step in (4, 2):
            ticket.preview(
                lambda image, step=step: shown.append((step, ticket.progress[0], image)), step=step
            )
        latents = engine.submit(request(pipe, seed=1), output="latent").result(WAIT).image
        ticket.result(WAIT)
    assert [step for step, *_ in shown] == [2, 4]
    plain = pipe.generate([request(pipe, seed=1)], output="latent").images[0]
    np.testing.assert_allclose(latents, plain, rtol=1e-5, atol=1e-5)


def test_failures_that_are_not_explained(pipe, not_finite):
    with Engine(pipe, slots=1, explain_failures=False) as engine:
        ticket = engine.submit(request(pipe, seed=1))
        with pytest.raises(NonFiniteError, match="got numbers that are not finite, expected"):
            ticket.result(WAIT)


def test_what_nobody_expects_ends_every_ticket_with_it(pipe, monkeypatch, gate):
    def fail(*_):
        raise MemoryError("no room")

    engine = Engine(pipe, slots=1)
    tickets = [engine.submit(request(pipe, seed=i)) for i in range(3)]
    assert gate.entered.wait(WAIT)
    monkeypatch.setattr(Slots, "take_finished", fail)
    gate.set()
    for ticket in tickets:
        with pytest.raises(MemoryError, match="no room"):
            ticket.result(WAIT)
    with pytest.raises(MemoryError, match="no room"):
        engine.submit(request(pipe))
    assert not engine.close()


def test_closing_drains_or_cancels(pipe, gate):
    engine = Engine(pipe, slots=1)
    tickets = [engine.submit(request(pipe, seed=i)) for i in range(3)]
    assert gate.entered.wait(WAIT)
    threading.Timer(0.05, gate.set).start()
    assert engine.close(drain=True)
    assert all(ticket.state == "done" for ticket in tickets)
    with pytest.raises(CancelledError, match="closed"):
        engine.submit(request(pipe))


def test_closing_gives_up_after_a_time(pipe, gate):
    engine = Engine(pipe, slots=1)
    tickets = [engine.submit(request(pipe, seed=i)) for i in range(3)]
    assert gate.entered.wait(WAIT)
    threading.Timer(0.2, gate.set).start()
    assert not engine.close(drain=True, timeout=0.01)
    assert {ticket.state for ticket in tickets[1:]} == {"cancelled"}


def test_previews_are_images_on_the_way(pipe, monkeypatch):
    monkeypatch.setattr(engine_module, "chunk_length", lambda *_, **__: 1)
    shown = []
    with Engine(pipe, slots=2) as engine:
        ticket = engine.submit(request(pipe, steps=6))
        ticket.preview(shown.append)
        image = ticket.result(WAIT).image
    assert len(shown) == 1
    assert shown[0].shape == image.shape
    assert not np.array_equal(shown[0], image)


def test_a_callback_that_fails_ends_its_ticket_alone(pipe):
    def fail(*_):
        raise ValueError("no such window")

    with Engine(pipe, slots=2) as engine:
        first = engine.submit(request(pipe), on_progress=fail)
        second = engine.submit(request(pipe, seed=1))
        with pytest.raises(ValueError, match="no such window"):
            first.result(WAIT)
        assert second.result(WAIT).image.any()


@pytest.mark.parametrize("kind", ["mesh", "offload"])
def test_threads_take_turns_where_they_have_to(folder, kind, monkeypatch):
    options = {"mesh": "fsdp=2"} if kind == "mesh" else {"offload": "text"}
    shared = tiny.with_linear_unet(jaxdiff.load(folder, **options))
    run, inside, most = CompiledFunction.__call__, [], []

    def watched(self, *arguments):
        inside.append(1)
        most.append(len(inside))
        try:
            return jax.block_until_ready(run(self, *arguments))
        finally:
            inside.pop()

    monkeypatch.setattr(CompiledFunction, "__call__", watched)
    requests = [request(shared, seed=i, steps=2 + i % 3) for i in range(8)]
    with Engine(shared, slots=2) as engine:
        tickets = [engine.submit(each) for each in requests]
        images = [ticket.result(WAIT).image for ticket in tickets]
    assert max(most) == 1
    plain = shared.generate(requests, output="numpy").images
    for mine, own in zip(images, plain, strict=True):
        assert np.abs(mine.astype(int) - own).max() <= 1


def test_groups_without_images_make_room(pipe, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_GROUPS", 2)
    with Engine(pipe, slots=1) as engine:
        for height in (16, 32, 48, 16):
            engine.submit(request(pipe, height=height)).result(WAIT)
        assert len(engine._groups) <= 2


def test_images_that_enter_keep_their_group(pipe, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_GROUPS", 1)
    entering, go, admit = threading.Event(), threading.Event(), Slots.admit

    def slow(self, images):
        entering.set()
        assert go.wait(WAIT)
        admit(self, images)

    monkeypatch.setattr(Slots, "admit", slow)
    with Engine(pipe, slots=1) as engine:
        first = engine.submit(request(pipe, steps=9))
        assert entering.wait(WAIT)
        second = engine.submit(request(pipe, height=32))
        threading.Timer(0.2, go.set).start()
        assert first.result(WAIT).image.any()
        assert second.result(WAIT).image.any()


def test_kinds_that_are_compiled_do_not_stop_the_others(pipe, monkeypatch):
    compiling, go, run = threading.Event(), threading.Event(), Slots.run

    def slow(self, steps):
        if self.seated[0][1].request.height == 32 and not go.is_set():
            compiling.set()
            assert go.wait(WAIT)
        return run(self, steps)

    monkeypatch.setattr(Slots, "run", slow)
    with Engine(pipe, slots=2) as engine:
        engine.submit(request(pipe)).result(WAIT)
        new = [engine.submit(request(pipe, seed=i, height=32)) for i in range(3)]
        assert compiling.wait(WAIT)
        assert engine.submit(request(pipe, seed=1)).result(WAIT).image.any()
        assert {ticket.state for ticket in new} <= {"waiting", "sampling"}
        go.set()
        assert all(ticket.result(WAIT).image.any() for ticket in new)


def test_an_image_that_cannot_be_decoded_fails_alone(pipe, monkeypatch):
    decode = ImagePreparer.decode_alike

    def broken(self, images, settings):
        if any(image.request.height == 32 for image, _ in images):
            raise MemoryError("no room")
        return decode(self, images, settings)

    monkeypatch.setattr(ImagePreparer, "decode_alike", broken)
    with Engine(pipe, slots=2) as engine:
        tall, small = (engine.submit(request(pipe, height=side)) for side in (32, 16))
        with pytest.raises(MemoryError, match="no room"):
            tall.result(WAIT)
        assert small.result(WAIT).image.any()
        assert not engine.broken
