"""A server in a thread, and what tests of it need."""

import base64
import contextlib
import io
import threading
import time

import httpx
from PIL import Image

from jaxdiff.serve.access import Access
from jaxdiff.serve.limits import Limits
from jaxdiff.serve.server import Server, ServerOptions
from jaxdiff.serve.service import Service

WAIT = 60  # seconds, after which a test fails rather than hangs
LIMITS = Limits(max_pixels=64 * 64, max_steps=40, max_prompt_length=200, max_image_pixels=10_000)


class Running:
    """A server in a thread of its own."""

    def __init__(self, service, options):
        self.service, self.server = service, Server(service, options)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.url = self.server.address

    def client(self, **options):
        return httpx.Client(base_url=self.url, timeout=WAIT, **options)

    def close(self):
        self.server.should_exit = True
        self.thread.join(WAIT)
        assert not self.thread.is_alive()
        self.service.close()


def wait_for(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.005)


@contextlib.contextmanager
def running(load, *, ready=True, shutdown_timeout=30.0, access=None, **options):
    """A server that serves what `load` gives."""
    service = Service(load, **{"slots": 2, "limits": LIMITS, "name": "tiny", **options})
    access = access or Access()
    own = Running(service, ServerOptions(port=0, shutdown_timeout=shutdown_timeout, access=access))
    try:
        if ready:
            wait_for(lambda: service.is_ready or service.is_broken)
        yield own
    finally:
        own.close()


def image_of(text):
    """The image in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(array, form="PNG"):
    """A file of uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()
