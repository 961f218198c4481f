"""The search for the largest batch, on memories that are known."""

import pytest

from jaxdiff.planning.max_batch import max_batch_size


@pytest.mark.parametrize("first", [8, 16, 64, 128, 512])
def test_linear_memory_needs_three_compilations(first):
    asked = []

    def needed(batch):
        asked.append(batch)
        return 100 + 3 * batch

    known = {first: float(100 + 3 * first)}
    assert max_batch_size(needed, known, 100 + 3 * 100, 8) == 96
    assert len(asked) <= 2


def test_what_does_not_fit_is_not_the_answer():
    """Memory that grows faster than a line: the guess is too large, and then corrected."""

    def needed(batch):
        return float(batch**2)

    found = max_batch_size(needed, {8: 64.0}, 1000, 8)
    assert found % 8 == 0
    assert needed(found) <= 1000


def test_none():
    assert max_batch_size(lambda batch: 100 + batch, {8: 108.0}, 50, 8) == 0
