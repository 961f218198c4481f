"""What an engine has generated goes through threads to where it is written."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from jaxdiff.core.errors import InputError, WriteError
from jaxdiff.generation import finisher as finisher_module
from jaxdiff.generation.finisher import Finisher, StageFinisher
from jaxdiff.generation.tickets import CancelledError, GeneratedImage
from jaxdiff.pipeline.request import Request


def done(number, height=8):
    own = {"prompt": "a", "negative_prompt": None, "guidance_scale": 1.0, "seed": number}
    sizes = {"height": height, "width": 8, "steps": 2, "sampler": "euler", "timestep_spacing": None}
    future = Future()
    image = np.full((height, 8, 3), number, np.uint8)
    future.set_result(GeneratedImage(image, Request(**own, **sizes), {}))
    return future


def failed(error):
    future = Future()
    future.set_exception(error)
    return future


def test_images_and_reasons_are_written_and_what_was_cancelled_is_not():
    written = {}
    with Finisher(written.__setitem__, pytest.fail) as finisher:
        finisher.put("image", done(3))
        finisher.put("reason", failed(InputError("no such file")))
        finisher.put("cancelled", failed(CancelledError("closed")))
    assert written["image"].max() == 3
    assert str(written["reason"]) == "no such file"
    assert len(written) == 2


def test_put_waits_while_the_queue_is_full(monkeypatch):
    monkeypatch.setattr(finisher_module, "QUEUED", 3)
    gate, written, given = threading.Event(), [], []

    def write(asked, _):
        gate.wait()
        written.append(asked)

    def put():
        for number in range(20):
            finisher.put(number, done(number))
            given.append(number)

    with Finisher(write, pytest.fail) as finisher:
        thread = threading.Thread(target=put)
        thread.start()
        time.sleep(0.15)
        assert len(given) == 3 + finisher_module.WRITERS
        gate.set()
        thread.join()
    assert sorted(written) == list(range(20))


def test_after_an_error_nothing_more_is_written():
    written, errors = [], []

    def write(asked, _):
        if asked == 1:
            raise WriteError("no space")
        written.append(asked)

    def run():
        with Finisher(write, errors.append) as finisher:
            finisher.put(0, done(0))
            finisher.put(1, done(1))
            deadline = time.monotonic() + 10
            while not errors and time.monotonic() < deadline:
                time.sleep(0.01)
            finisher.put(2, done(2))

    with pytest.raises(WriteError, match="no space"):
        run()
    assert written == [0]
    assert len(errors) == 1


def test_an_error_of_the_engine_ends_all():
    errors = []

    def run():
        with Finisher(lambda *_: None, errors.append) as finisher:
            finisher.put(0, failed(MemoryError("no room")))

    with pytest.raises(MemoryError, match="no room"):
        run()
    assert len(errors) == 1


def test_stages_run_on_images_of_one_kind_together():
    batches, written = [], {}

    def run(asked, images):
        batches.append((list(asked), {image.image.shape for image in images}))
        return [image.image + 100 for image in images]

    with StageFinisher(written.__setitem__, pytest.fail, run, 2) as finisher:
        for number, height in enumerate((8, 16, 8, 8)):
            finisher.put(number, done(number, height))
        finisher.put("bad", failed(InputError("bad")))
    assert batches[0] == ([0, 2], {(8, 8, 3)})
    assert sorted(batches[1:]) == [([1], {(16, 8, 3)}), ([3], {(8, 8, 3)})]
    assert {number: written[number].max() for number in range(4)} == {i: 100 + i for i in range(4)}
    assert isinstance(written["bad"], InputError)
