"""Names of topologies, and what is missing where nothing can be compiled."""

import importlib.util
import os
from contextlib import nullcontext
from importlib import metadata

import pytest

from jaxdiff.cli.planning.chips import CHIPS
from jaxdiff.cli.planning.topology import parse, prepare
from jaxdiff.core.errors import InputError

TOLD = (
    "ALLOW_MULTIPLE_LIBTPU_LOAD",
    "TPU_SKIP_MDS_QUERY",
    "TPU_WORKER_HOSTNAMES",
    "TPU_ACCELERATOR_TYPE",
)


def test_parse():
    topology = parse("v5p:4x4x8")
    assert (topology.chips, topology.chip, topology.title) == (128, CHIPS["v5p"], "v5p:4x4x8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5:2x2", "plan: got 'v5', expected one of v4, v5e"),
        ("v5e", "plan: got v5e, expected a chip and its grid, such as v5e:4x4"),
        ("v5e:0x2", "expected a chip and its grid"),
        ("v5p:4x4", "plan: got v5p:4x4, expected 3 sides for v5p, such as v5p:4x4x4"),
    ],
)
def test_what_is_no_topology(text, said):
    with pytest.raises(InputError, match=said):
        parse(text)


@pytest.mark.parametrize("missing", ["libtpu", "flatbuffers"])
def test_packages_that_are_missing_are_named(monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != missing or None)
    with pytest.raises(InputError, match=f'no package {missing}, expected all of pip install "jax'):
        prepare(parse("v5e:2x2"), schedules="nowhere")


@pytest.mark.parametrize(("installed", "refused"), [("0.0.42.1", False), ("0.0.52", True)])
def test_the_compiler_is_the_one_that_jax_asks_for(monkeypatch, installed, refused):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(metadata, "version", {"libtpu": installed, "jax": "0.10.2"}.__getitem__)
    asked = ["numpy>=2.0", 'libtpu==0.0.42.*; extra == "tpu"']
    monkeypatch.setattr(metadata, "requires", {"jax": asked}.__getitem__)
    for name in TOLD:
        monkeypatch.setenv(name, "")
    said = r'got libtpu 0.0.52, expected ==0.0.42.\* as jax 0.10.2 asks for: pip install "jax\[tpu'
    with pytest.raises(InputError, match=said) if refused else nullcontext():
        prepare(parse("v5e:2x2"))
    assert all(os.environ[name] for name in TOLD) != refused


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p"])
def test_clocks_are_the_peaks_of_all_matrix_units(name):
    chip = CHIPS[name]
    assert chip.cores * 4 * 2 * 128**2 * chip.clock == pytest.approx(chip.peak, rel=2e-3)
