"""A server of the tiny model on a free port, for all tests of the folder."""

import pytest
import tiny
from gated_slots import gated_slots
from serving import running

import jaxdiff
from jaxdiff.pipeline.slots import ImagePreparer


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    """The tiny model on one device, with a linear network for its UNet."""
    whole = jaxdiff.load(tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny"))
    return tiny.with_linear_unet(tiny.first_devices(whole, 1))


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    (folder / "ink.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="session")
def server(pipe, loras):
    with running(lambda: pipe, max_waiting=16, lora_folder=loras) as own:
        yield own


@pytest.fixture
def client(server):
    with server.client() as own:
        yield own


@pytest.fixture
def gate(monkeypatch):
    """Slots run only while it is set; `gate.entered` is set as soon as they want to."""
    gate = gated_slots(monkeypatch)
    yield gate
    gate.set()


@pytest.fixture
def not_finite(monkeypatch):
    """Images with seed 13 have numbers that are not finite."""
    decode = ImagePreparer.decode_alike

    def broken(self, images, settings):
        found = decode(self, images, settings)
        return [
            (pixels, finite and image.request.seed != 13)
            for (pixels, finite), (image, _) in zip(found, images, strict=True)
        ]

    monkeypatch.setattr(ImagePreparer, "decode_alike", broken)
