"""Noise schedules of continuous times: flows, and EDM. Their protocol is `schedules.Schedule`."""

import dataclasses
import math
from typing import TypeVar

import numpy as np

from jaxdiff.core.types import Array, NDArray
from jaxdiff.core.validate import in_range, one_of
from jaxdiff.diffusion.denoising import alpha_sigma_from_edm, numpy_of

T_ = TypeVar("T_", Array, NDArray)
FLOW_PATHS = ("linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """A flow between images and noise: t = `time_scale` s with s from 0, an image, to 1, noise.

    On the `linear` path, rectified flow (2209.03003), x = (1 - s) x0 + s eps, whose velocity dx/ds
    is eps - x0. On the `cosine` path (GVP of SiT, 2401.08740), x = cos(pi s / 2) x0 +
    sin(pi s / 2) eps, it is pi / 2 times `v_prediction`.
    """

    time_scale: float = 1000.0  # what the network takes at pure noise
    shift: float = 1.0  # of the times that training and sampling visit, towards noise
    path: str = "linear"  # a name in FLOW_PATHS

    def __post_init__(self) -> None:
        one_of("path", self.path, FLOW_PATHS)
        in_range("time_scale", self.time_scale, 1e-6, 1e6)
        in_range("shift", self.shift, 1e-3, 1e3)

    @property
    def num_discrete(self) -> None:
        """Times are continuous."""
        return None

    def alpha_sigma(self, t: T_) -> tuple[T_, T_]:
        """The point of the path at s, exact at both ends."""
        s = t / self.time_scale
        if self.path == "linear":
            return 1 - s, s
        sin = numpy_of(t).sin
        return sin(math.pi / 2 * (1 - s)), sin(math.pi / 2 * s)

    def derivatives(self, t: T_) -> tuple[T_, T_]:
        """Those by t, 1 / `time_scale` of those by s."""
        if self.path == "linear":
            rate = numpy_of(t).full_like(t, 1 / self.time_scale)
            return -rate, rate
        alpha, sigma = self.alpha_sigma(t)
        speed = math.pi / 2 / self.time_scale
        return -speed * sigma, speed * alpha

    def time_of(self, sigma_edm: T_) -> T_:
        """s = r / (1 + r), or 2 / pi arctan(r), for ratios r up to infinity."""
        if self.path == "cosine":
            return self.time_scale * 2 / math.pi * numpy_of(sigma_edm).arctan(sigma_edm)
        with np.errstate(divide="ignore"):
            return self.time_scale / (1 + 1 / sigma_edm)

    def level_of(self, sigma_edm: T_) -> tuple[T_, T_, T_]:
        """`time_of` and the point of the path."""
        t = self.time_of(sigma_edm)
        return t, *self.alpha_sigma(t)

    def shifted(self, s: T_) -> T_:
        """The share s of noise, 0 to 1, moved by `shift` (SD3, 2403.03206, eq. 23)."""
        return self.shift * s / (1 + (self.shift - 1) * s)


def resolution_shift(
    num_tokens: int,
    *,
    base: tuple[int, float] = (256, 0.5),
    largest: tuple[int, float] = (4096, 1.15),
) -> float:
    """The `shift` of a flow for images of `num_tokens` tokens, as Flux has it.

    Its logarithm is a straight line through two points (tokens, logarithm). The more tokens an
    image has, the more noise hides the same share of it (SD3, 2403.03206, section 5.3.2).
    """
    (n0, low), (n1, high) = base, largest
    return math.exp(low + (high - low) * (num_tokens - n0) / (n1 - n0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMSchedule:
    """EDM (2206.00364, table 1): the network takes c_in (y + s n) at the time c_noise = ln(s) / 4.

    With y = `sigma_data` x0 that is x = alpha x0 + sigma eps, alpha^2 + sigma^2 = 1, and EDM's
    network F predicts -v: D(y) = c_skip (y + s n) + c_out F is sigma_data (alpha x + sigma F).
    """

    sigma_data: float = 0.5  # standard deviation of the data, by which they are divided
    sigma_min: float = 0.002  # the noise s that sampling spans
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        in_range("sigma_data", self.sigma_data, 1e-6, 1e6)
        in_range("sigma_min", self.sigma_min, 1e-9, 1e6)
        in_range("sigma_max", self.sigma_max, self.sigma_min, 1e9)

    @property
    def num_discrete(self) -> None:
        """Times are continuous."""
        return None

    def alpha_sigma(self, t: T_) -> tuple[T_, T_]:
        """(sigma_data, s) / sqrt(s^2 + sigma_data^2); (1, 0) at time -infinity."""
        return alpha_sigma_from_edm(numpy_of(t).exp(4 * t) / self.sigma_data)

    def derivatives(self, t: T_) -> tuple[T_, T_]:
        """With d log(sigma / alpha) / dt = 4: -4 alpha sigma^2 and 4 alpha^2 sigma."""
        alpha, sigma = self.alpha_sigma(t)
        return -4 * alpha * sigma**2, 4 * alpha**2 * sigma

    def time_of(self, sigma_edm: T_) -> T_:
        """ln(s) / 4 with s = sigma_data * sigma_edm."""
        with np.errstate(divide="ignore"):
            return numpy_of(sigma_edm).log(self.sigma_data * sigma_edm) / 4

    def level_of(self, sigma_edm: T_) -> tuple[T_, T_, T_]:
        """`time_of` and the point of the path."""
        t = self.time_of(sigma_edm)
        return t, *self.alpha_sigma(t)
