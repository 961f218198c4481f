"""The Frechet distance of Gaussians against its closed forms."""

import numpy as np
import pytest
from scipy import linalg

from jaxdiff.core.errors import InputError
from jaxdiff.evaluation.frechet import Moments, frechet_distance, moments

RNG = np.random.default_rng(0)


def rotation(d):
    return np.linalg.qr(RNG.normal(size=(d, d)))[0]


def gaussian(d, rank=None):
    factor = RNG.normal(size=(d, rank or d))
    return Moments(RNG.normal(size=d), factor @ factor.T)


def test_a_gaussian_is_at_no_distance_from_itself():
    for rank in (None, 3):
        one = gaussian(8, rank)
        assert abs(frechet_distance(one, one)) < 1e-10 * np.trace(one.covariance)


def test_axes_in_common():
    """Covariances that commute: |m - m'|^2 + sum (s - s')^2 over the common axes."""
    turn, s, t = rotation(6), RNG.uniform(0.1, 2, 6), RNG.uniform(0.1, 2, 6)
    a, b = (Moments(RNG.normal(size=6), (turn * v**2) @ turn.T) for v in (s, t))
    expected = np.sum((a.mean - b.mean) ** 2) + np.sum((s - t) ** 2)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-10)


def test_in_one_dimension():
    a, b = (Moments(np.array([m]), np.array([[s**2]])) for m, s in ((1.0, 2.0), (-2.0, 0.5)))
    np.testing.assert_allclose(frechet_distance(a, b), 3**2 + 1.5**2, rtol=1e-12)


def test_any_covariances_by_the_root_of_their_product():
    a, b = gaussian(7), gaussian(7)
    root = linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    np.testing.assert_allclose(frechet_distance(a, b), expected.real, rtol=1e-8)
    np.testing.assert_allclose(frechet_distance(b, a), expected.real, rtol=1e-8)


def test_fewer_images_than_dimensions():
    """Gaussians in different planes: nothing of their covariances is shared."""
    a = Moments(np.zeros(4), np.diag([1.0, 2.0, 0.0, 0.0]))
    b = Moments(np.ones(4), np.diag([0.0, 0.0, 3.0, 0.0]))
    np.testing.assert_allclose(frechet_distance(a, b), 4 + 6, rtol=1e-12)


def test_moments_of_drawn_features_come_near_their_gaussian():
    true = gaussian(3)
    drawn = RNG.multivariate_normal(true.mean, true.covariance, 200_000).astype(np.float32)
    found = moments(drawn)
    scale = np.trace(true.covariance)
    # a mean is off by its variance over n, roots of the eigenvalues by as much about
    assert frechet_distance(found, true) < 10 * scale / 200_000
    with pytest.raises(InputError, match="got the features of 1 images, expected at least 2"):
        moments(drawn[:1])
