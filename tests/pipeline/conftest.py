import pytest
import tiny

import jaxdiff


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    """The tiny model on all 8 fake devices."""
    return jaxdiff.load(tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def one_device(pipe):
    """The same model on one device."""
    return tiny.first_devices(pipe, 1)


@pytest.fixture(scope="session")
def single(one_device):
    """The same model on one device, with a linear network for its UNet."""
    return tiny.with_linear_unet(one_device)
