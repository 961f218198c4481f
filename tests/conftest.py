"""Strict numerics for every test: 8 fake devices, no silent promotion, checked shapes.

XLA's optimisations are off: networks this small take longer to compile than to run.
"""

import gc
import os
import shutil

from on_devices import flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # of commands under test, too
os.environ["XLA_FLAGS"] = flags(8)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import pytest
import typechecker
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

typechecker.install("jaxdiff")

# Of a busy machine no example's time says anything.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

gc.set_threshold(200_000, 20, 50)  # traced programs are many objects that live long

COMPILED = "compiled"  # the folder in pytest's cache that all workers and runs share
MAX_BYTES = 2 << 30  # of it, before it is emptied
MAX_PROGRAMS = 1500  # in memory
programs = 0


def pytest_sessionstart(session):
    """One compilation cache for all workers, and for the next run of the tests.

    It has no size limit, for which JAX would read the whole folder at each program that it writes:
    before there are workers, it is emptied if it has grown too large.
    Nor does it lock: who reads what another worker is still writing compiles it, and pytest
    ignores JAX's warning of that.
    """
    folder = session.config.cache.mkdir(COMPILED)
    is_worker = hasattr(session.config, "workerinput")
    os.environ["XDG_CACHE_HOME"] = str(session.config.cache.mkdir("home"))
    if not is_worker and sum(path.stat().st_size for path in folder.iterdir()) > MAX_BYTES:
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def count(event, *_, **__):
        global programs
        programs += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(count)


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker is left alone with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """What some files have compiled does not stay in memory for all others."""
    yield
    global programs
    if programs > MAX_PROGRAMS:
        jax.clear_caches()
        programs = 0


@pytest.fixture
def standard_promotion():
    """optax raises floats to the power of integer counts, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield
