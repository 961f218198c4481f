import pytest
import tiny

import jaxdiff
from jaxdiff.core.shutdown import SHUTDOWN_REQUESTED


@pytest.fixture(autouse=True)
def running():
    """Nothing is shut down, as it is after a command that another test ran."""
    SHUTDOWN_REQUESTED.clear()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of the tiny model."""
    return tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def pipe(folder):
    """The tiny model on one device, with a linear network for its UNet."""
    whole = jaxdiff.load(folder)
    return tiny.with_linear_unet(tiny.first_devices(whole, 1))
