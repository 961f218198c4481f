"""The peak of devices against their data sheets, and what is compiled for them with."""

import types

import jax
import pytest

from jaxdiff.parallel.chips import SCOPED_MEMORY, compiler_options, peak_flops


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


def test_the_compiler_is_given_options_for_a_transformer(monkeypatch):
    """What LIBTPU_INIT_ARGS says of the same is the user's to decide."""
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    more = {SCOPED_MEMORY: "65536"}
    gaining = ("TPU v5 lite", "TPU v5p", "TPU v6 lite")
    for kind in (*gaining, "TPU v4", "cpu", "NVIDIA H200"):
        wanted = more if kind in gaining else {}
        assert compiler_options(kind, transformer=True) == wanted
        assert compiler_options(kind, transformer=False) == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{SCOPED_MEMORY}=98304")
    assert compiler_options("TPU v6 lite", transformer=True) == {}
