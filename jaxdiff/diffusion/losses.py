"""The forward process and the weights of the training loss."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff.core.types import Array, Float
from jaxdiff.core.validate import one_of
from jaxdiff.diffusion.denoising import PREDICTION_TYPES, PerImage, per_image, target

# Weight of the squared error of each prediction type relative to that of x0, given the SNR S:
# ||y - target||^2 = factor * ||D - x0||^2 for one and the same denoiser D.
X0_FACTORS: dict[str, Callable[[Array], Array]] = {
    "epsilon": lambda S: S,
    "sample": jnp.ones_like,
    "v_prediction": lambda S: S + 1,
    "edm": lambda S: S + 1,
    # 1 / sigma^2 on the path alpha + sigma = 1, where alpha / sigma = sqrt(S)
    "flow_prediction": lambda S: (jnp.sqrt(S) + 1) ** 2,
    "score": lambda S: S,  # of its error times sigma, see `regression`
}


def add_noise(
    x0: Float[Array, "b *d"], eps: Float[Array, "b *d"], alpha: PerImage, sigma: PerImage
) -> Float[Array, "b *d"]:
    """x_t = alpha x_0 + sigma eps (2006.11239, eq. 4)."""
    return per_image(alpha, x0) * x0 + per_image(sigma, x0) * eps


def snr(alpha: Float[Array, "b"], sigma: Float[Array, "b"]) -> Float[Array, "b"]:
    """The signal-to-noise ratio (alpha / sigma)^2."""
    return (alpha / sigma) ** 2


def uniform(prediction_type: str, S: Float[Array, "b"], gamma: float) -> Float[Array, "b"]:
    """Weight 1 on the error of the prediction itself: DDPM's L_simple (2006.11239, eq. 14)."""
    return jnp.ones_like(S)


def _eps_error_weight(prediction_type: str, S: Float[Array, "b"]) -> Float[Array, "b"]:
    """The factor from the error of this type to that of eps: ||e - eps||^2 = f ||y - target||^2."""
    if prediction_type in ("epsilon", "score"):
        return jnp.ones_like(S)
    return S / X0_FACTORS[prediction_type](S)


def soft_min_snr(prediction_type: str, S: Float[Array, "b"], gamma: float) -> Float[Array, "b"]:
    """Weight SNR gamma / (SNR + gamma) on the error of x0: min_snr without its corner.

    As in HDiT (2401.11605, section 3.4), whose weight is 4 SNR / (4 + SNR) of gamma 4.
    """
    return gamma / (S + gamma) * _eps_error_weight(prediction_type, S)


def p2(prediction_type: str, S: Float[Array, "b"], gamma: float) -> Float[Array, "b"]:
    """Weight 1 / (1 + SNR)^gamma on the error of eps (P2, 2204.00227, eq. 8 with k = 1)."""
    return (1 + S) ** -gamma * _eps_error_weight(prediction_type, S)


def min_snr(prediction_type: str, S: Float[Array, "b"], gamma: float) -> Float[Array, "b"]:
    """Weight min(SNR, gamma) on the error of x0 (Min-SNR, 2303.09556, section 3.4).

    Written for the error of the kind that the network predicts; 1, its limit, for epsilon at SNR 0.
    """
    factor = X0_FACTORS[prediction_type](S)
    zero = factor == 0
    return jnp.where(zero, 1.0, jnp.minimum(S, gamma) / jnp.where(zero, 1.0, factor))


WEIGHTINGS: dict[str, Callable[[str, Array, float], Array]] = {
    "uniform": uniform,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "p2": p2,
}


def weights(
    weighting: str, prediction_type: str, snr: Float[Array, "b"], gamma: float = 5.0
) -> Float[Array, "b"]:
    """The weight of each image's squared error, for a network that predicts `prediction_type`."""
    one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    return WEIGHTINGS[one_of("weighting", weighting, WEIGHTINGS)](prediction_type, snr, gamma)


def in_loss_units(
    prediction_type: str, output: Float[Array, "b *d"], sigma: PerImage
) -> Float[Array, "b *d"]:
    """An output as losses compare it: a score times sigma, all others as they are.

    This is denoising score matching with the weight sigma^2 (1907.05600, section 4.2): a
    score grows as 1 / sigma, and without it clean levels would be nearly all of the loss.
    """
    return per_image(sigma, output) * output if prediction_type == "score" else output


def regression(
    prediction_type: str,
    output: Float[Array, "b *d"],
    x0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    alpha: PerImage,
    sigma: PerImage,
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """(output, target) whose difference is the error of a network, as `weights` weigh it."""
    if prediction_type == "score":  # finite at sigma = 0 too
        return in_loss_units(prediction_type, output, sigma), -eps
    return output, target(prediction_type, x0, eps, alpha, sigma)


def mse(
    output: Float[Array, "b *d"], wanted: Float[Array, "b *d"], weights: Float[Array, "b"]
) -> Float[Array, ""]:
    """The weighted squared error: the mean over each image's elements, then over the images."""
    return jnp.mean(squared_errors(output, wanted, weights))


def squared_errors(
    output: Float[Array, "b *d"], wanted: Float[Array, "b *d"], weights: Float[Array, "b"]
) -> Float[Array, "b"]:
    """The weighted squared error of each image, the mean over its elements."""
    error = (output - wanted) ** 2
    return weights * jnp.mean(error.reshape(error.shape[0], -1), axis=1)
