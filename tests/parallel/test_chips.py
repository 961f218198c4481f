"""The peak of devices against their data sheets."""

import types

import jax
import pytest

from jaxdiff.parallel.chips import peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
    ],
)
def test_the_peak_is_that_of_the_devices_together(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert peak_flops() == 4 * peak


def test_other_devices_have_none():
    assert peak_flops() is None
