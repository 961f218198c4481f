"""Names of topologies, and what they are of."""

import pytest

from jaxdiff.core.errors import InputError
from jaxdiff.parallel.chips import CHIPS, TPU
from jaxdiff.planning.topology import parse_topology


def test_parse():
    topology = parse_topology("v5p:4x4x8")
    assert (topology.num_chips, topology.chip, topology.title) == (128, CHIPS["v5p"], "v5p:4x4x8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5:2x2", "plan: got 'v5', expected one of v4, v5e"),
        ("v5e", "plan: got v5e, expected a chip and its grid, such as v5e:4x4"),
        ("v5e:0x2", "expected a chip and its grid"),
        ("v5p:4x4", "plan: got v5p:4x4, expected 3 sides for v5p, such as v5p:4x4x4"),
        ("h200:2x4", "plan: got h200:2x4, expected one number for h200, such as h200:4"),
        ("h200:16", "plan: got h200:16, expected 1 to 8 GPUs, as one machine has"),
    ],
)
def test_what_is_no_topology(text, said):
    with pytest.raises(InputError, match=said):
        parse_topology(text)


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p"])
def test_clocks_are_the_peaks_of_all_matrix_units(name):
    chip = CHIPS[name]
    assert isinstance(chip, TPU)
    assert chip.cores * 4 * 2 * 128**2 * chip.clock == pytest.approx(chip.peak_flops, rel=2e-3)


def test_a_gpu_gives_a_program_what_jax_takes_of_it(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    assert CHIPS["h200"].hbm == 0.75 * CHIPS["h200"].memory
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".95")
    assert CHIPS["h200"].hbm == 0.95 * CHIPS["h200"].memory
