"""Strict numerics for every test: 8 fake devices, no silent promotion, checked shapes."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

install_import_hook("jaxdiff", "typechecker.check")


@pytest.fixture
def standard_promotion():
    """optax raises floats to the power of integer counts, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield
