"""What samplers see of a model: noise levels, and what it predicts at them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Bool, Float, Int, PyTree
from jaxdiff.core.validate import one_of

T = TypeVar("T")
# a number for each image, or one for all; or the same in a shape that multiplies x
PerImage = Float[Array, ""] | Float[Array, "#b"] | Float[Array, "#b ..."]


class NoiseLevel(NamedTuple):
    """The noise level of each image: the time for the network, and x = alpha x0 + sigma eps.

    alpha and sigma have the axes of x, all but the first of length 1, so that they multiply it. A
    level belongs to a step: guidance that changes with the schedule is constant within one step,
    however often that step calls the network.
    """

    t: Float[Array, "b"]
    alpha: Float[Array, "b ..."]
    sigma: Float[Array, "b ..."]
    step: Int[Array, "b"]  # index of the step
    num_steps: Int[Array, "b"]  # of the whole schedule
    step_start_sigma: Float[Array, "b"]  # sigma / alpha where the step begins
    active: Bool[Array, "b"]  # whether what comes out is used; else the image rests

    def as_substep_of(self, here: "NoiseLevel", active: Bool[Array, "b"]) -> "NoiseLevel":
        """This level as an intermediate one of the step that starts from `here`."""
        return self._replace(step=here.step, step_start_sigma=here.step_start_sigma, active=active)


def numpy_of(array: Any) -> Any:
    """jax.numpy for arrays of jax, else numpy."""
    return jnp if isinstance(array, jax.Array) else np


def alpha_sigma_from_edm(sigma_edm: T) -> tuple[T, T]:
    """(alpha, sigma) with sigma / alpha = sigma_edm, alpha^2 + sigma^2 = 1; exact at 0 and inf."""
    xp, ratio = numpy_of(sigma_edm), cast(Any, sigma_edm)
    with np.errstate(divide="ignore"):
        return 1 / xp.hypot(1, ratio), 1 / xp.hypot(1, 1 / ratio)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """A denoised image and the noise that goes with it, in which order it unpacks: (x0, eps).

    They satisfy x = alpha x0 + sigma eps unless a guidance rule renoises along another direction
    (CFG++): samplers add noise back along `eps` and take the image from `x0`. `variance` is what a
    network that learns the variance of its steps says of it (Improved DDPM, 2102.09672), for
    samplers that ask for it; None for others.
    """

    x0: Float[Array, "b *d"]
    eps: Float[Array, "b *d"]
    variance: Float[Array, "b *d"] | None = None

    def __iter__(self) -> Iterator[Array]:
        return iter((self.x0, self.eps))


# (x, level, guidance memory) -> (prediction, guidance memory): all a sampler knows of the model.
Denoiser = Callable[[Array, NoiseLevel, PyTree], tuple[Prediction, PyTree]]


class PredictionType(NamedTuple):
    """One kind of prediction: its way to (x0, eps) and the training target that it regresses."""

    predict: Callable[[Array, Array, Array, Array], Prediction]
    target: Callable[[Array, Array, Array, Array], Array]


# `y` is the network's output, a = alpha, s = sigma.
PREDICTION_TYPES: dict[str, PredictionType] = {
    # DDPM (2006.11239, eq. 11 and 14); undefined at a = 0
    "epsilon": PredictionType(
        predict=lambda y, x, a, s: Prediction((x - s * y) / a, y),
        target=lambda x0, eps, a, s: eps,
    ),
    # undefined at s = 0
    "sample": PredictionType(
        predict=lambda y, x, a, s: Prediction(y, (x - a * y) / s),
        target=lambda x0, eps, a, s: x0,
    ),
    # Progressive distillation (2202.00512, appendix D); needs a^2 + s^2 = 1
    "v_prediction": PredictionType(
        predict=lambda y, x, a, s: Prediction(a * x - s * y, s * x + a * y),
        target=lambda x0, eps, a, s: a * eps - s * x0,
    ),
    # EDM's F (2206.00364, table 1), which is -v
    "edm": PredictionType(
        predict=lambda y, x, a, s: Prediction(a * x + s * y, s * x - a * y),
        target=lambda x0, eps, a, s: s * x0 - a * eps,
    ),
    # Rectified flow (2209.03003), noise minus image; on its own path a + s = 1
    "flow_prediction": PredictionType(
        predict=lambda y, x, a, s: Prediction((x - s * y) / (a + s), (x + a * y) / (a + s)),
        target=lambda x0, eps, a, s: eps - x0,
    ),
    # grad log p(x) of the noisy images (2011.13456, eq. 7); undefined at a = 0 and s = 0
    "score": PredictionType(
        predict=lambda y, x, a, s: Prediction((x + s**2 * y) / a, -s * y),
        target=lambda x0, eps, a, s: -eps / s,
    ),
}


def per_image(value: Array, like: Array) -> Array:
    """`value` shaped to multiply `like`: (b,) becomes (b, 1, ..., 1), a scalar stays."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def select(condition: Bool[Array, "b"], these: T, others: T) -> T:
    """Of two trees with leaves (b, ...), `these` for the images where `condition` is true."""
    return jax.tree.map(lambda a, b: jnp.where(per_image(condition, a), a, b), these, others)


def predict(
    prediction_type: str,
    output: Float[Array, "b *d"],
    x: Float[Array, "b *d"],
    alpha: PerImage,
    sigma: PerImage,
) -> Prediction:
    """The image and the noise that a network means by `output`, given the noisy input `x`."""
    rule = PREDICTION_TYPES[one_of("prediction_type", prediction_type, PREDICTION_TYPES)]
    return rule.predict(output, x, per_image(alpha, x), per_image(sigma, x))


def target(
    prediction_type: str,
    x0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    alpha: PerImage,
    sigma: PerImage,
) -> Float[Array, "b *d"]:
    """What a perfect network of this kind would output for x = alpha x0 + sigma eps."""
    rule = PREDICTION_TYPES[one_of("prediction_type", prediction_type, PREDICTION_TYPES)]
    return rule.target(x0, eps, per_image(alpha, x0), per_image(sigma, x0))
