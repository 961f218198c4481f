"""Averages of the parameters, in float32: exponential ones, and power functions of time.

A power-function average of the steps 1 ... n weighs step t by t^gamma (EDM2, 2312.02696, section
3.1). Its relative width is the standard deviation of that profile as a share of n. Averages of any
other width are linear combinations of snapshots of two (section 3.2).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Float, Int, NDArray, PyTree

Real = NDArray | np.float64


def decay_at(step: Int[Array, ""], decay: float, *, warmup: bool = True) -> Float[Array, ""]:
    """The decay b after `step` = n finished updates; with warm-up min(b, (1 + n) / (10 + n))."""
    n = step.astype(jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n)) if warmup else jnp.float32(decay)


def power_decay(step: Int[Array, ""], width: float) -> Float[Array, ""]:
    """(1 - 1/t)^(gamma + 1) at the update t = `step` + 1; nothing from before the first is left."""
    t = step.astype(jnp.float32) + 1
    return (1 - 1 / t) ** (exponent(width) + 1)


def exponent(width: float) -> float:
    """The gamma of a profile t^gamma whose relative standard deviation is `width`.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the largest real root.
    """
    inverse = width**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def update(ema: PyTree, params: PyTree, decay: Float[Array, ""]) -> PyTree:
    """b ema + (1 - b) params, written so that equal trees are an exact fixed point."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), ema, params)


def combination(kept: Sequence[tuple[int, float]], step: int, width: float) -> Float[NDArray, "n"]:
    """The factors of `kept` averages, (step, width) each, whose sum is nearest that of `width`.

    Nearest in the mean square of the profiles over the steps up to `step` (appendix C).
    """
    times = np.array([t for t, _ in kept], np.float64)
    powers = np.array([exponent(w) for _, w in kept])
    gram = _products(times[:, None], powers[:, None], times[None], powers[None])
    wanted = _products(times, powers, np.float64(step), np.float64(exponent(width)))
    return np.linalg.lstsq(gram, wanted, rcond=None)[0]


def _products(
    t: NDArray | np.float64,
    p: NDArray | np.float64,
    u: NDArray | np.float64,
    q: NDArray | np.float64,
) -> NDArray:
    """Inner products of the profiles (p + 1) x^p / t^(p + 1) on [0, t] and likewise q on [0, u].

    The integral of their product over [0, min(t, u)].
    """
    least = np.minimum(t, u)
    return (p + 1) * (q + 1) / (p + q + 1) * (least / t) ** (p + 1) * (least / u) ** (q + 1) / least
