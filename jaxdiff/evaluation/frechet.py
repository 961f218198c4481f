"""The Frechet distance of two sets of images, as Gaussians in a feature space (FID)."""

from typing import NamedTuple

import numpy as np

from jaxdiff.core.errors import InputError
from jaxdiff.core.types import Float, NDArray


class Moments(NamedTuple):
    """Mean and covariance of a set of features."""

    mean: Float[NDArray, "d"]
    covariance: Float[NDArray, "d d"]


def moments(features: Float[NDArray, "n d"]) -> Moments:
    """Mean and unbiased covariance, in float64; InputError for fewer than two."""
    if len(features) < 2:
        raise InputError(
            f"features: got the features of {len(features)} images, expected at least 2"
        )
    exact = features.astype(np.float64)
    return Moments(exact.mean(axis=0), np.atleast_2d(np.cov(exact, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (1706.08500, eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of R C_b R, R R = C_a, which
    is symmetric. With few images the distance is too large, by an amount that falls roughly as one
    over their number. So compare only distances of equally many images of the same kind.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * _safe_sqrt(values)) @ vectors.T
    shared = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = _safe_sqrt(shared).sum()
    apart = np.sum((a.mean - b.mean) ** 2)
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return float(apart + spread - 2 * cross)


def _safe_sqrt(values: Float[NDArray, "d"]) -> Float[NDArray, "d"]:
    """Square roots of eigenvalues; 0 for those that are only rounding errors.

    Fewer images than dimensions give many of these, and the root would make them large.
    """
    rounding = len(values) * np.finfo(np.float64).eps * values.max()
    return np.sqrt(np.where(values > rounding, values, 0))
