"""The arithmetic of a plan."""

import json

import pytest

from jaxdiff.parallel.chips import CHIPS, GIB
from jaxdiff.planning.compiling import CompiledProgram
from jaxdiff.planning.report import Plan, format_plan
from jaxdiff.planning.topology import parse_topology


def plan(topology="v5e:4x4", **fields):
    chosen = {
        "fits": True,
        "arguments": 3 * GIB,
        "cycles": 90e6,
        "kernel_cycles": 60e6,
        "bytes_sent": {"all-gather": 10e9},
        "collective_counts": {"all-gather": 4},
        "compiler": "libtpu 0.0.42.1",
        "compile_s": 7.0,
    }
    return Plan(
        topology=parse_topology(topology),
        batch_size=32,
        compiled=CompiledProgram(8 * GIB, **(chosen | fields)),
        model_flops=1.97e12,
        state_bytes={"weights": 1.5 * GIB},
    )


def test_seconds_are_cycles_over_the_clock_and_bytes_over_the_links():
    made = plan()
    assert made.compute_s == pytest.approx(0.1)
    assert made.links_s == pytest.approx(10e9 / CHIPS["v5e"].link)
    assert made.step_s == made.compute_s
    assert made.utilisation == pytest.approx(1.97e12 / (0.1 * 197e12))
    assert made.utilisation_apart == pytest.approx(1.97e12 / (0.15 * 197e12))


def test_slow_links_make_the_step():
    assert plan(bytes_sent={"all-gather": 40e9}).step_s == pytest.approx(0.2)


def test_text_and_json():
    made = plan()
    assert "8.00 GiB of 15.75 GiB a chip: fits" in format_plan(made)
    assert "320.0 images/s" in format_plan(made)
    assert "by libtpu 0.0.42.1 in 7 s" in format_plan(made)
    assert json.loads(json.dumps(made.to_json()))["utilisation"] == pytest.approx(0.1)


def test_what_does_not_fit_says_so_and_no_more():
    made = plan(fits=False, arguments=0.0, cycles=None, kernel_cycles=0.0, bytes_sent={})
    assert "DOES NOT FIT" in format_plan(made)
    assert "utilisation" not in made.to_json()


def test_of_a_gpu_no_time_is_said(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1")
    made = plan("h200:4", cycles=None, kernel_cycles=0.0, compiler="jax-cuda13-plugin 0.10.2")
    assert "h200:4  4 GPUs, batch 32 (8 a GPU)" in format_plan(made)
    assert "8.00 GiB of 141.00 GiB a GPU: fits" in format_plan(made)
    assert "4 all-gather 9.313 GiB: 22.2 ms on the links" in format_plan(made)
    assert "cycles" not in format_plan(made)
    assert "step" not in format_plan(made)
    assert {"step_s", "utilisation", "cycles"}.isdisjoint(made.to_json())
    assert made.to_json()["sent_bytes"] == {"all-gather": 10e9}
