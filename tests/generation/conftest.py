import pytest
import tiny

import jaxdiff


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    """The tiny model on one device, with a linear network for its UNet."""
    whole = jaxdiff.load(tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny"))
    return tiny.with_linear_unet(tiny.first_devices(whole, 1))
