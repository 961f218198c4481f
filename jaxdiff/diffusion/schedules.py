"""Noise schedules: the noise level x = alpha(t) x0 + sigma(t) eps of the network's input at time t.

All are one protocol, `Schedule`. `VPSchedule` has the T discrete levels of DDPM's training; times
of `FlowSchedule` and `EDMSchedule` are continuous. Functions of t take arrays of the host, in
float64, and arrays inside a compiled program, in float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from jaxdiff.core.aliases import former_names
from jaxdiff.core.types import Array, Float, NDArray
from jaxdiff.core.validate import in_range, one_of, positive
from jaxdiff.diffusion.denoising import alpha_sigma_from_edm, numpy_of

__all__ = [
    "SCHEDULES",
    "EDMSchedule",
    "FlowSchedule",
    "Schedule",
    "VPSchedule",
    "alpha_sigma_from_edm",
    "resolution_shift",
    "to_zero_terminal_snr",
]
__getattr__ = former_names(__name__)


def __dir__() -> list[str]:
    return __all__


T_ = TypeVar("T_", Array, NDArray)

FLOW_PATHS = ("linear", "cosine")
# Where noise must be finite, abar_T = 2^-24 stands for zero, as in diffusers.
MAX_SIGMA = float(np.sqrt(2.0**24 - 1))


@runtime_checkable
class Schedule(Protocol):
    """Noise levels by time, where time is what the network takes.

    x = alpha x0 + sigma eps is the network's input as it is: where a method scales noisy images
    before it calls the network, as EDM does, that factor is in alpha and sigma.
    """

    @property
    def num_discrete(self) -> int | None:
        """The number of levels, at times 0 ... num_discrete - 1; None if times are continuous."""
        ...

    def alpha_sigma(self, t: T_) -> tuple[T_, T_]:
        """(alpha, sigma) at times t; a discrete schedule rounds them."""
        ...

    def derivatives(self, t: T_) -> tuple[T_, T_]:
        """(d alpha / dt, d sigma / dt) at times t, by which x moves at d alpha x0 + d sigma eps."""
        ...

    def time_of(self, sigma_edm: T_) -> T_:
        """The time, not rounded, at which sigma / alpha is `sigma_edm`, 0 to infinity."""
        ...

    def level_of(self, sigma_edm: T_) -> tuple[T_, T_, T_]:
        """(t, alpha, sigma), not rounded, where sigma / alpha is `sigma_edm`, finite.

        Where a schedule has a highest level it ends there.
        """
        ...


def linear(T: int, first: float, last: float) -> Float[NDArray, "T"]:
    """Betas of DDPM (2006.11239, section 4): a straight line."""
    return np.linspace(first, last, T)


def scaled_linear(T: int, first: float, last: float) -> Float[NDArray, "T"]:
    """Betas of latent diffusion (2112.10752): sqrt(beta) is a straight line."""
    return np.linspace(first**0.5, last**0.5, T) ** 2


def cosine(T: int, first: float, last: float) -> Float[NDArray, "T"]:
    """Betas of improved DDPM (2102.09672, eq. 17), capped at 0.999; it has no other parameter."""
    alphas_cumprod = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


SCHEDULES: dict[str, Callable[[int, float, float], NDArray]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": cosine,
    "cosine": cosine,
}


def to_zero_terminal_snr(alphas_cumprod: Float[NDArray, "T"]) -> Float[NDArray, "T"]:
    """Shift and stretch sqrt(abar) so that nothing of the image is left at the last level.

    Lin et al. (2305.08891, algorithm 1). Needs a network that predicts v or x0: an eps prediction
    says nothing about x0 where alpha = 0.
    """
    r = np.sqrt(alphas_cumprod)
    return ((r - r[-1]) * r[0] / (r[0] - r[-1])) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VPSchedule:
    """A variance-preserving schedule of T discrete levels; the defaults are those of diffusers."""

    beta_schedule: str = "linear"  # a name in SCHEDULES
    num_train_timesteps: int = 1000  # T
    beta_start: float = 0.0001
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None  # the betas themselves; the four above give way
    zero_terminal_snr: bool = False  # diffusers: rescale_betas_zero_snr

    def __post_init__(self) -> None:
        one_of("beta_schedule", self.beta_schedule, SCHEDULES)
        positive("num_train_timesteps", self.num_train_timesteps)
        in_range("beta_start", self.beta_start, 0, 1)
        in_range("beta_end", self.beta_end, self.beta_start, 1)
        for beta in self.trained_betas or ():
            in_range("trained_betas", beta, 0, 1)
        _ = self.sigma_edm  # the tables are made with the schedule, not in a first call

    @property
    def num_discrete(self) -> int:
        """T, the number of levels."""
        return len(self.alphas_cumprod)

    @functools.cached_property
    def alphas_cumprod(self) -> Float[NDArray, "T"]:
        """The product of 1 - beta_i over i <= t (2006.11239, eq. 4)."""
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, np.float64)
        else:
            make = SCHEDULES[self.beta_schedule]
            betas = make(self.num_train_timesteps, self.beta_start, self.beta_end)
        alphas_cumprod = np.cumprod(1 - betas)
        return to_zero_terminal_snr(alphas_cumprod) if self.zero_terminal_snr else alphas_cumprod

    @functools.cached_property
    def alpha(self) -> Float[NDArray, "T"]:
        """Signal: sqrt(alphas_cumprod)."""
        return np.sqrt(self.alphas_cumprod)

    @functools.cached_property
    def sigma(self) -> Float[NDArray, "T"]:
        """Noise: sqrt(1 - alphas_cumprod)."""
        return np.sqrt(1 - self.alphas_cumprod)

    @functools.cached_property
    def sigma_edm(self) -> Float[NDArray, "T"]:
        """sigma / alpha, rising with t; infinite at the end of a zero-terminal-SNR schedule."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    def alpha_sigma(self, t: T_) -> tuple[T_, T_]:
        """(alpha, sigma) of the levels nearest to times t, 0 to T - 1."""
        return self._nearest(self.alpha, t), self._nearest(self.sigma, t)

    def derivatives(self, t: T_) -> tuple[T_, T_]:
        """Those of the nearest levels, by differences of the angle whose tangent is the ratio.

        With alpha = cos(angle) and sigma = sin(angle) they keep alpha^2 + sigma^2 = 1.
        """
        speed = np.gradient(np.arctan2(self.sigma, self.alpha)) if self.num_discrete > 1 else 0.0
        return self._nearest(-self.sigma * speed, t), self._nearest(self.alpha * speed, t)

    def _nearest(self, table: NDArray, t: T_) -> T_:
        """The rows of a table at the levels nearest to times t."""
        xp = numpy_of(t)
        if not xp.issubdtype(t.dtype, xp.integer):
            t = xp.round(t).astype(xp.int32)
        return xp.asarray(table, xp.float64 if xp is np else xp.float32)[t]

    def time_of(self, sigma_edm: T_) -> T_:
        """The time of a ratio, linear in its logarithm between two levels, and on none beyond."""
        xp = numpy_of(sigma_edm)
        table = xp.asarray(np.log(np.minimum(self.sigma_edm, MAX_SIGMA)), sigma_edm.dtype)
        with np.errstate(divide="ignore"):
            log_ratio = xp.log(sigma_edm)
        return xp.interp(log_ratio, table, xp.arange(self.num_discrete, dtype=table.dtype))

    def level_of(self, sigma_edm: T_) -> tuple[T_, T_, T_]:
        """`time_of` and the point of the path, up to the highest level."""
        xp = numpy_of(sigma_edm)
        sigma_edm = xp.minimum(sigma_edm, min(float(self.sigma_edm[-1]), MAX_SIGMA))
        alpha = 1 / xp.hypot(1, sigma_edm)
        return self.time_of(sigma_edm), alpha, alpha * sigma_edm


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
