"""Exact denoisers of Gaussian mixtures as networks, and what they say about a traced program.

The grids made here tell the network the ratio sigma / alpha as its time, from which it finds the
noise level again; so an oracle works on any grid and in any precision.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.denoising import NoiseLevel, alpha_sigma_from_edm, per_image, target
from jaxdiff.diffusion.grids import HostTimestepGrid, TimestepGrid
from jaxdiff.guidance.base import RULES, GuidanceScales
from jaxdiff.guidance.denoiser import guided_denoiser, stack_streams


def ratio_layout(ratio, start=1.0):
    """A layout through the given ratios, the last of which is where the last step lands."""
    ratio = np.asarray(ratio, np.float64)
    return HostTimestepGrid(ratio, *alpha_sigma_from_edm(ratio), start)


def ratio_grid(ratio, dtype=jnp.float32, length=None):
    """A grid through the given ratios that tells the network the ratio.

    Grids of one `length`, which is that of the longest, share their programs.
    """
    return TimestepGrid.from_host(ratio_layout(ratio), length=length, dtype=dtype)


def levels(t):
    """(alpha, sigma) of a time that is the ratio."""
    return 1 / jnp.sqrt(1 + t**2), t / jnp.sqrt(1 + t**2)


@dataclasses.dataclass(frozen=True)
class RatioSchedule:
    """The schedule of such networks."""

    num_discrete: int | None = None

    def alpha_sigma(self, t):
        """As `levels`."""
        return levels(t)

    def derivatives(self, t):
        """Those of `levels`."""
        alpha, _ = levels(t)
        return -t * alpha**3, alpha**3

    def time_of(self, sigma_edm):
        """The ratio."""
        return sigma_edm

    def level_of(self, sigma_edm):
        """The ratio and its levels."""
        return sigma_edm, *levels(sigma_edm)


RATIO_SCHEDULE = RatioSchedule()


def level_at(ratio, step=0, steps=10, ndim=2):
    """The level of a ratio, as that from which a step begins, for any images with `ndim` axes.

    The network is told the ratio.
    """
    alpha, sigma = (level.reshape((1,) * ndim) for level in levels(ratio))
    t, step, steps, active = (jnp.reshape(v, (1,)) for v in (ratio, step, steps, True))
    return NoiseLevel(t, alpha, sigma, step, steps, step_start_sigma=t, active=active)


def posterior_mean(x, alpha, sigma, means, variances, weights):
    """E[x0 | x] elementwise for x = alpha x0 + sigma eps and x0 ~ sum_k w_k N(m_k, v_k).

    `means` and `variances` have shape (k,), `weights` (n, k) for the n images of x.
    """
    x, alpha, sigma = (jnp.asarray(a)[..., None] for a in (x, alpha, sigma))
    weights = weights.reshape(len(weights), *(1,) * (x.ndim - 2), -1)
    means, variances = (jnp.asarray(a, x.dtype) for a in (means, variances))
    with jax.numpy_rank_promotion("allow"):
        spread = alpha**2 * variances + sigma**2
        off = x - alpha * means
        log_p = jnp.log(weights) - off**2 / (2 * spread) - jnp.log(spread) / 2
        each = means + alpha * variances / spread * off
        return jnp.sum(jax.nn.softmax(log_p, axis=-1) * each, axis=-1)


def output_for(kind, D, x, t):
    """What a network of this kind outputs at ratio t when it means the denoised image D."""
    alpha, sigma = levels(t)
    eps = (x - per_image(alpha, x) * D) / per_image(sigma, x)
    return target(kind, D, eps, alpha, sigma)


def gaussian(kind):
    """A network for data N(m, v), each element alike; its conditioning is (m, v), each (n,)."""

    def network(weights, x, t, conditioning):
        m, v = (per_image(c, x) for c in conditioning)
        alpha, sigma = (per_image(level, x) for level in levels(t))
        D = m + alpha * v / (alpha**2 * v + sigma**2) * (x - alpha * m)
        return output_for(kind, D, x, t)

    return network


def mixture(kind, means, variances):
    """A network for a mixture; its conditioning is the weights of the components, (n, k)."""

    def network(weights, x, t, conditioning):
        alpha, sigma = (per_image(level, x) for level in levels(t))
        D = posterior_mean(x, alpha, sigma, means, variances, conditioning)
        return output_for(kind, D, x, t)

    return network


def unguided(network, conditioning, kind="epsilon"):
    """The denoiser of a network with conditioning (b,) leaves and no guidance."""
    dials = GuidanceScales(jnp.ones(1))  # of which no guidance takes note
    return guided_denoiser(
        network, (), stack_streams(conditioning), dials, rule=RULES["none"], prediction_type=kind
    )


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside it: loops, branches, calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def calls(jaxpr, name):
    """The shapes of the arguments of each call of the jitted function called `name`."""
    return [
        [v.aval.shape for v in equation.invars]
        for equation in equations(jaxpr)
        if equation.params.get("name") == name
    ]
