"""Noise schedules: how much signal is left at each of the T noise levels of the training."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Float, Int, NDArray
from jaxdiff.core.validate import in_range, one_of, positive

__all__ = ["SCHEDULES", "NoiseSchedule", "alpha_sigma_from_edm", "to_zero_terminal_snr"]


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


def alpha_sigma_from_edm(
    sigma_edm: Float[NDArray, "*n"],
) -> tuple[Float[NDArray, "*n"], Float[NDArray, "*n"]]:
    """(alpha, sigma) with sigma / alpha = sigma_edm, alpha^2 + sigma^2 = 1; exact at 0 and inf."""
    with np.errstate(divide="ignore"):
        return 1 / np.hypot(1, sigma_edm), 1 / np.hypot(1, 1 / sigma_edm)


def interpolate(table: Float[NDArray, "T"], t: Float[NDArray, "n"]) -> Float[NDArray, "n"]:
    """`table` at times 0 <= t <= T-1, linear between two levels."""
    low = np.floor(t).astype(np.int64)
    part = t - low
    # On a level its right neighbour must not enter: 0 * infinity is not 0.
    high = np.where(part > 0, low + 1, low)
    rise = np.where(part > 0, table[high], 0) - np.where(part > 0, table[low], 0)
    return table[low] + part * rise


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
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

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule in a diffusers scheduler_config.json, whatever scheduler class wrote it.

        Those files carry the keys of other classes too, so keys unknown here are passed over.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in config.items() if k in names and v is not None}
        if "trained_betas" in values:
            values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
        if "rescale_betas_zero_snr" in config:
            values["zero_terminal_snr"] = bool(config["rescale_betas_zero_snr"])
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """The diffusers keys of this schedule, as `from_config` reads them."""
        config = dataclasses.asdict(self)
        config["rescale_betas_zero_snr"] = config.pop("zero_terminal_snr")
        if config["beta_schedule"] == "cosine":
            config["beta_schedule"] = "squaredcos_cap_v2"
        if self.trained_betas is not None:
            config["trained_betas"] = list(self.trained_betas)
        return config

    @property
    def num_timesteps(self) -> int:
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

    def alpha_sigma(self, t: Int[Array, "b"]) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
        """(alpha, sigma) in float32 at integer times t, inside a compiled training step."""
        return jnp.asarray(self.alpha, jnp.float32)[t], jnp.asarray(self.sigma, jnp.float32)[t]
