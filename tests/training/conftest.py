"""What the tests of training share."""

import jax
import pytest


@pytest.fixture
def standard_promotion():
    """optax raises floats to the power of integer counts, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield
