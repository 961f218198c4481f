"""The arithmetic of a plan."""

import dataclasses
import json

import pytest

from jaxdiff.parallel.chips import CHIPS, GIB
from jaxdiff.planning.compiling import CompiledProgram
from jaxdiff.planning.report import FittingMesh, Plan, SamplingPlan, format_plan
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


def sampling_plan(**fields):
    """Of encoders that take 0.1 s, 20 steps of the same length, and a decoder of 0.1 s."""
    chosen = {
        "topology": parse_topology("v5e:4x4"),
        "batch_size": 32,
        "programs": {
            "text_encoders": dataclasses.replace(plan(), resident_bytes=2.0 * GIB),
            "loop": dataclasses.replace(plan(), steps=20, resident_bytes=1.0 * GIB),
            "decoder": dataclasses.replace(plan(), resident_bytes=3.5 * GIB),
        },
        "weights": {"unet": 1.5 * GIB, "text_encoder": 2.0 * GIB, "vae": 0.5 * GIB},
    }
    return SamplingPlan(**chosen | fields)


def test_a_batch_takes_all_programs_one_after_the_other():
    made = sampling_plan(max_batch_size=64)
    assert made.batch_s == pytest.approx(22 * 0.1)
    assert made.images_per_s == pytest.approx(32 / 2.2)
    assert made.total == (8 + 3.5) * GIB
    assert made.fits
    values = json.loads(json.dumps(made.to_json()))
    assert values["images_per_s"] == made.images_per_s
    assert values["programs"]["loop"]["seconds"] == pytest.approx(2.0)
    assert values["programs"]["decoder"]["utilisation"] == pytest.approx(0.1)
    assert values["step_s"] == pytest.approx(0.1)  # as where the loop was all that was planned
    lines = format_plan(made).splitlines()
    assert "  memory       11.50 GiB of 15.75 GiB a chip: fits" in lines
    assert "    weights    unet 1.50 GiB, text_encoder 2.00 GiB, vae 0.50 GiB" in lines
    assert "  images       14.55 images/s, 2200.0 ms a batch" in lines
    assert "  largest      batch 64 (4 a chip)" in lines
    headings = [line.strip() for line in lines if line.endswith(("once a batch", "steps"))]
    assert headings == ["text encoders, once a batch", "loop, 20 steps", "decoder, once a batch"]


def test_weights_of_others_take_room():
    programs = {"loop": dataclasses.replace(plan(), resident_bytes=8.0 * GIB)}
    made = sampling_plan(programs=programs, fitting_mesh=FittingMesh(2, 12.0 * GIB))
    assert not made.fits
    assert "  mesh         --mesh fsdp=2 fits: 12.00 GiB a chip" in format_plan(made).splitlines()
    assert made.to_json()["fitting_mesh"] == {"fsdp": 2, "total_bytes": 12.0 * GIB}


def test_without_an_estimate_there_is_no_time_of_a_batch():
    unknown = plan("h200:4", cycles=None, kernel_cycles=0.0)
    made = sampling_plan(topology=parse_topology("h200:4"), programs={"loop": unknown})
    assert made.batch_s is None
    assert "images" not in format_plan(made)
    assert {"batch_s", "images_per_s"}.isdisjoint(made.to_json())
