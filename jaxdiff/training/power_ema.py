"""Power-function EMAs of the parameters, and post-hoc EMA.

A power-function EMA of the steps 1 ... n weights step t by t^gamma (EDM2, 2312.02696, section 3.1).
Its `std` (sigma_rel) is the standard deviation of that profile relative to n. Post-hoc EMA: for any
other std it is a linear combination of snapshots of two such averages (section 3.2).
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Float, Int, NDArray

Real = NDArray | np.float64


def power_decay(step: Int[Array, ""], std: float) -> Float[Array, ""]:
    """(1 - 1/t)^(gamma + 1) at the update t = `step` + 1; the initial value has no weight."""
    t = step.astype(jnp.float32) + 1
    return (1 - 1 / t) ** (std_to_exponent(std) + 1)


def std_to_exponent(std: float) -> float:
    """The gamma of the profile t^gamma whose relative standard deviation is `std`.

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the largest real root.
    """
    inverse = std**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def post_hoc_coefficients(
    snapshots: Sequence[tuple[int, float]], step: int, std: float
) -> Float[NDArray, "n"]:
    """Coefficients of `snapshots`, (step, std) each, whose sum is nearest the EMA of `std`.

    Nearest in the mean square of the profiles up to `step` (2312.02696, appendix C).
    """
    times = np.array([t for t, _ in snapshots], np.float64)
    powers = np.array([std_to_exponent(w) for _, w in snapshots])
    gram = _products(times[:, None], powers[:, None], times[None], powers[None])
    target = _products(times, powers, np.float64(step), np.float64(std_to_exponent(std)))
    return np.linalg.lstsq(gram, target, rcond=None)[0]


def _products(
    t: Real,
    p: Real,
    u: Real,
    q: Real,
) -> NDArray:
    """Inner products of the profiles (p + 1) x^p / t^(p + 1) on [0, t] and likewise q on [0, u].

    The integral of their product over [0, min(t, u)].
    """
    least = np.minimum(t, u)
    return (p + 1) * (q + 1) / (p + q + 1) * (least / t) ** (p + 1) * (least / u) ** (q + 1) / least
