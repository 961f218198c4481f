"""Strict numerics for every test: 8 fake devices, no silent promotion, checked shapes.

XLA's optimisations are off: networks this small take longer to compile than to run.
"""

import gc
import os

from on_devices import flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # of commands under test, too
os.environ["XLA_FLAGS"] = flags(8)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

install_import_hook("jaxdiff", "typechecker.check")

gc.set_threshold(200_000, 20, 50)  # traced programs are many objects that live long


@pytest.fixture(autouse=True, scope="session")
def compiled_once(pytestconfig):
    """One compilation cache for all workers, and for the next run of the tests.

    A size limit makes jax lock the cache: without one, a worker may read what another is writing.
    """
    folder = pytestconfig.cache.mkdir("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 4 << 30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """What one file has compiled does not stay in memory for the next."""
    yield
    jax.clear_caches()


@pytest.fixture
def standard_promotion():
    """optax raises floats to the power of integer counts, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield
