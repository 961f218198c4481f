"""The variational bound on the likelihood, by which networks learn the variance of a step.

L_vlb has one term for each level t (2006.11239, eq. 5; 2102.09672, eq. 4 to 7). With x' one level
below x = x_t, the forward process has the posterior q(x' | x, x0) =
N(alpha' (1 - q^2) x0 + (sigma'/sigma) q x, beta~) where q = (sigma'/alpha') / (sigma/alpha). The
network's step p(x' | x) has its image D in place of x0 and the variance v in place of beta~. With
log v = f log beta + (1 - f) log beta~ (2102.09672, eq. 15), where beta~ = sigma'^2 (1 - q^2) and
beta = sigma^2 (1 - q^2), and with L = log(beta / beta~) = 2 log(sigma / sigma') the term is

    KL(q || p) = 1/2 (f L - 1 + exp(-f L) (1 + (SNR' - SNR) (x0 - D)^2))

since (alpha' (1 - q^2))^2 / beta~ = SNR' - SNR. At t = 0, where a step goes to the clean image, the
term is the negative log-likelihood of x0 in the bins of 8-bit images (2006.11239, eq. 13).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Float, Int, NDArray
from jaxdiff.diffusion.denoising import per_image
from jaxdiff.diffusion.schedules import VPSchedule

HALF_BIN = 1 / 255  # of one of the 256 values of an 8-bit image in [-1, 1]
LAST_BIN = 0.999  # values beyond it are in the last bin of their side, which has no end


def bound_terms(
    schedule: VPSchedule,
    variance: Float[Array, "b *d"],
    D: Float[Array, "b *d"],
    x0: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> Float[Array, "b"]:
    """Each image's term of L_vlb at its level `t`, in bits per element of the image.

    `variance` is the output of the network, -1 for beta~ and 1 for beta, and D its image. The sum
    over all levels is L_vlb without the term of the prior, which no network changes.
    """
    log_ratios, snr_drops, log_decoder = (
        jnp.asarray(table, x0.dtype) for table in _tables(schedule)
    )
    log_ratio, snr_drop = (per_image(table[t], x0) for table in (log_ratios, snr_drops))
    f, last = (variance + 1) / 2, per_image(t == 0, x0)
    growth = f * log_ratio  # log(v / beta~), at high noise so small that 1 would round it away
    kl = 0.5 * (growth + jnp.expm1(-growth) + jnp.exp(-growth) * snr_drop * (x0 - D) ** 2)
    # Elsewhere D may be so far from x0 that gradients of the decoder are not finite.
    mean = jnp.where(last, D, x0)
    log_std = 0.5 * (f * log_decoder[0] + (1 - f) * log_decoder[1])
    nats = jnp.where(last, -discretised_log_likelihood(x0, mean, log_std), kl)
    return jnp.mean(nats.reshape(len(nats), -1), axis=1) / math.log(2)


def _tables(
    schedule: VPSchedule,
) -> tuple[Float[NDArray, "T"], Float[NDArray, "T"], Float[NDArray, "2"]]:
    """log(beta / beta~) and SNR' - SNR of each level, 0 at the first, and log variances at t = 0.

    These are log beta of the first level and log beta~ of the second, for the first has none.
    """
    sigma, snr = schedule.sigma, (schedule.alpha / schedule.sigma) ** 2
    log_ratio = 2 * np.diff(np.log(sigma), prepend=np.log(sigma[0]))
    snr_drop = -np.diff(snr, prepend=snr[0])
    second = 1 - snr[1] / snr[0] if len(snr) > 1 else 1.0  # 1 - q^2
    return log_ratio, snr_drop, np.log(sigma[0] ** 2 * np.array([1, second]))


def discretised_log_likelihood(
    x: Float[Array, "b *d"], mean: Float[Array, "b *d"], log_std: Float[Array, "b *d"]
) -> Float[Array, "b *d"]:
    """The log-probability of each value's bin under a normal distribution (2006.11239, eq. 13)."""
    centre, half = (x - mean) * jnp.exp(-log_std), HALF_BIN * jnp.exp(-log_std)
    # Mirrored where it is right of the mean: there the distribution function is rounded to 1.
    mirrored = centre > 0
    low, high = x < -LAST_BIN, x > LAST_BIN  # whose bins have no end on the left, on the right
    open_left = jnp.where(mirrored, high, low)
    open_right = jnp.where(mirrored, low, high)
    near = -jnp.abs(centre)
    right = jax.scipy.special.log_ndtr(jnp.where(open_right, 0.0, near + half))
    right = jnp.where(open_right, 0.0, right)
    gap = right - jax.scipy.special.log_ndtr(near - half)  # above 0
    return jnp.where(open_left, right, right + jnp.log(-jnp.expm1(-gap)))
