"""How many devices the cores of a CPU become."""

import os

import jax
import pytest

from jaxdiff.parallel import cores


@pytest.fixture
def machine(monkeypatch):
    """A machine of 8 cores and 16 GiB; the number of devices that JAX is asked for."""
    asked = []
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 << 20}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *pair: asked.append(pair))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    return asked


@pytest.mark.parametrize(
    ("weight_bytes", "most", "count"),
    [
        (20 << 20, 100, 8),  # one per core
        (20 << 20, 3, 3),  # one per image
        (1 << 30, 100, 4),  # copies take a quarter of the memory
        (5 << 30, 100, 1),
        (20 << 20, 1, 1),
    ],
)
def test_a_device_of_each_core_as_far_as_there_is_room(machine, weight_bytes, most, count):
    assert cores.one_device_per_core(weight_bytes, most) == count
    assert machine == ([("jax_num_cpu_devices", count)] if count > 1 else [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=2"),
        ("JAX_NUM_CPU_DEVICES", "2"),
    ],
)
def test_who_has_chosen_is_asked_nothing(machine, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert cores.one_device_per_core(1, 8) == 1
    assert machine == []


def test_devices_that_are_there_stay(machine, monkeypatch):
    def refuse(*_):
        raise RuntimeError("backends are initialized")

    monkeypatch.setattr(jax.config, "update", refuse)
    assert cores.one_device_per_core(1, 8) == 1
