"""What samplers see of a model: noise levels, and what it predicts at them.

How diffusers' schedulers place the levels of a grid is in `checkpoints.timestep_grids`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.core.types import Array, Bool, Float, Int, NDArray, PyTree
from jaxdiff.core.validate import one_of

T = TypeVar("T")
# a number for each image, or one for all; or the same in a shape that multiplies x
PerImage = Float[Array, ""] | Float[Array, "#b"] | Float[Array, "#b ..."]


def leading(T: int, n: int, extra_points: int) -> Float[NDArray, "n"]:
    """Multiples of T // n from 0 up: never reaches T-1 (2305.08891, table 2)."""
    return np.arange(n + extra_points)[::-1][:n] * float(T // (n + extra_points))


def linspace(T: int, n: int, extra_points: int) -> Float[NDArray, "n"]:
    """Equal distances from T-1 to 0 (2305.08891, table 2); one single step starts at T-1."""
    return np.linspace(0, T - 1, max(n + extra_points, 2))[::-1][:n]


def trailing(T: int, n: int, extra_points: int) -> Float[NDArray, "n"]:
    """Multiples of T / n from T down, less 1 (2305.08891, table 2): for few steps and zero SNR."""
    # Written so, halves round as they do in the reference implementation.
    return np.round(np.arange(T, 0, -T / n)[:n]) - 1


def karras(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """EDM sigmas with equal distances in sigma^(1/7) (2206.00364, eq. 5)."""
    return np.linspace(first ** (1 / 7), last ** (1 / 7), n) ** 7


def exponential(first: float, last: float, n: int) -> Float[NDArray, "n"]:
    """EDM sigmas with equal distances in log sigma, which is DPM-Solver's uniform lambda."""
    return np.exp(np.linspace(np.log(first), np.log(last), n))


# A timestep spacing takes T, the number of steps and of extra points at the clean end; a sigma
# schedule takes the first and the last sigma and the number of steps.
TIMESTEP_SPACINGS: dict[str, Callable[[int, int, int], NDArray]] = {
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
}
SIGMA_SCHEDULES: dict[str, Callable[[float, float, int], NDArray]] = {
    "karras": karras,
    "exponential": exponential,
}
SPACINGS = (*TIMESTEP_SPACINGS, *SIGMA_SCHEDULES)


class HostTimestepGrid(NamedTuple):
    """The noise levels of n steps in float64: level 0 is the noisiest, level n the final one.

    `t` is the network's timestep; t[n] is 0, that of the first level of the schedule.
    `init_noise_sigma` is the standard deviation of the noise that the sampler starts from.
    """

    t: Float[NDArray, "n_1"]
    alpha: Float[NDArray, "n_1"]
    sigma: Float[NDArray, "n_1"]
    init_noise_sigma: float


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


class TimestepGrid(NamedTuple):
    """The grids of b images for a compiled loop, padded so that the number of steps is data too.

    A grid of one row serves all images of a batch.
    """

    t: Float[Array, "b n_1"]
    alpha: Float[Array, "b n_1"]
    sigma: Float[Array, "b n_1"]
    init_noise_sigma: Float[Array, "b"]
    num_steps: Int[Array, "b"]
    first: Int[Array, "b"]  # the step that an image begins with
    last: Int[Array, "b"]  # and the one at which it rests, not run any more

    def for_images(self, count: int) -> "TimestepGrid":
        """The grid with one row for each of `count` images."""
        if len(self.t) == count:
            return self
        return TimestepGrid(*(jnp.broadcast_to(a, (count, *a.shape[1:])) for a in self))

    def level(self, step: Int[Array, "b"], ndim: int) -> NoiseLevel:
        """The levels at which these steps start and the ones before end, for x with `ndim` axes."""
        t, alpha, sigma = (
            jnp.take_along_axis(table, step[:, None], axis=1)[:, 0] for table in self[:3]
        )
        shape = (len(step),) + (1,) * (ndim - 1)
        return NoiseLevel(
            t,
            alpha.reshape(shape),
            sigma.reshape(shape),
            step=step,
            num_steps=self.num_steps,
            step_start_sigma=sigma / alpha,
            active=jnp.ones(len(step), bool),
        )

    @classmethod
    def from_host(
        cls, grid: HostTimestepGrid, length: int | None = None, dtype: Any = jnp.float32
    ) -> "TimestepGrid":
        """The grid of a host grid, one row, padded with clean levels to `length` steps."""
        num_steps = len(grid.t) - 1
        pad = (0, (length or num_steps) - num_steps)
        return cls(
            t=jnp.asarray(np.pad(grid.t, pad), dtype)[None],
            alpha=jnp.asarray(np.pad(grid.alpha, pad, constant_values=1.0), dtype)[None],
            sigma=jnp.asarray(np.pad(grid.sigma, pad), dtype)[None],
            init_noise_sigma=jnp.asarray([grid.init_noise_sigma], dtype),
            num_steps=jnp.asarray([num_steps], jnp.int32),
            first=jnp.zeros(1, jnp.int32),
            last=jnp.asarray([num_steps], jnp.int32),
        )


def numpy_of(array: Any) -> Any:
    """jax.numpy for arrays of jax, else numpy."""
    return jnp if isinstance(array, jax.Array) else np


def alpha_sigma_from_edm(sigma_edm: T) -> tuple[T, T]:
    """(alpha, sigma) with sigma / alpha = sigma_edm, alpha^2 + sigma^2 = 1; exact at 0 and inf."""
    xp, ratio = numpy_of(sigma_edm), cast(Any, sigma_edm)
    with np.errstate(divide="ignore"):
        return 1 / xp.hypot(1, ratio), 1 / xp.hypot(1, 1 / ratio)


class Prediction(NamedTuple):
    """A denoised image and the noise that goes with it.

    They satisfy x = alpha x0 + sigma eps unless a guidance rule renoises along another direction
    (CFG++): samplers add noise back along `eps` and take the image from `x0`.
    """

    x0: Float[Array, "b *d"]
    eps: Float[Array, "b *d"]


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
    # Rectified flow (2209.03003), noise minus image; on its own path a + s = 1
    "flow_prediction": PredictionType(
        predict=lambda y, x, a, s: Prediction((x - s * y) / (a + s), (x + a * y) / (a + s)),
        target=lambda x0, eps, a, s: eps - x0,
    ),
}


def per_image(value: Array, like: Array) -> Array:
    """`value` shaped to multiply `like`: (b,) becomes (b, 1, ..., 1), a scalar stays."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def select(chosen: Bool[Array, "b"], these: T, others: T) -> T:
    """Of two trees with leaves (b, ...), `these` for the images that are `chosen`."""
    return jax.tree.map(lambda a, b: jnp.where(per_image(chosen, a), a, b), these, others)


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
