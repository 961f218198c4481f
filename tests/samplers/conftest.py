"""Double precision for tests of exactness."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def keys(x64):
    return jax.vmap(jax.random.key)(jnp.array([1, 2], jnp.uint32))
