"""Measures of images, by hand."""

import numpy as np
import pytest

from jaxdiff.evaluation.measures import chroma, clipped_fraction, contrast, pairwise_distance


def test_measures_by_hand():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[0, :32] = (255, 100, 100)
    assert clipped_fraction(image) == pytest.approx((1 + 1 / 3) / 2)
    assert chroma(image) == pytest.approx(155 / 255 / 2)
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    assert pairwise_distance(np.stack([black, white])) == 1
    half = np.concatenate([black[:32], white[:32]])
    assert contrast(np.stack([half, white])) == pytest.approx((0.5 + 0) / 2)
    green = half * np.array([0, 1, 0], np.uint8)
    assert contrast(green[None]) == pytest.approx(0.7152 / 2)
    assert pairwise_distance(np.stack([black, black, white])) == pytest.approx(2 / 3)
