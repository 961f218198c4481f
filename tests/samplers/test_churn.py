"""Churn against the algorithm of its paper in numpy."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import RATIO_SCHEDULE, level_at

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.samplers.base import get_sampler, init_state

pytestmark = pytest.mark.usefixtures("x64")

SIGMAS = [5.0, 2.0, 0.9, 0.3, 0.0]
NOISES = np.random.default_rng(0).normal(size=(4, 3))
START = np.array([4.0, -7.0, 0.5])


def denoised(u, sigma):
    """A denoiser of EDM, of u = x0 + sigma n."""
    return jnp.tanh(u) / (1 + sigma)


def algorithm_2(s_churn, s_tmin, s_tmax, s_noise, *, corrects):
    """2206.00364, algorithm 2, line by line; without lines 9 to 11 if not `corrects`."""
    x, N = START, len(SIGMAS) - 1
    for i, (t, t_next) in enumerate(itertools.pairwise(SIGMAS)):
        gamma = min(s_churn / N, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * s_noise * NOISES[i]
        d = (x_hat - denoised(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if corrects and t_next != 0:
            d_next = (x - denoised(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (d + d_next) / 2
    return x


def denoise(x, level, state):
    """`denoised` at the time that the network is given, which is the ratio."""
    D = denoised(x / level.alpha, level.t[:, None])
    return Prediction(D, (x - level.alpha * D) / level.sigma), state


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize(
    "numbers",
    [(1.2, 0.0, math.inf, 1.0), (40.0, 0.0, math.inf, 1.0), (1.2, 0.9, 2.0, 1.1)],
    ids=["churn", "at most sqrt 2", "in a range"],
)
def test_churn_is_algorithm_2(name, numbers):
    options = zip(("churn", "s_tmin", "s_tmax", "s_noise"), numbers, strict=True)
    text = f"{name}:{','.join(f'{key}={value}' for key, value in options)}"
    sampler = get_sampler(text).for_schedule(RATIO_SCHEDULE)
    levels = [level_at(jnp.asarray(s), step=i, steps=len(SIGMAS) - 1) for i, s in enumerate(SIGMAS)]
    state = init_state(levels[0].alpha * START[None], sampler=sampler)
    for i, (here, there) in enumerate(itertools.pairwise(levels)):
        noise = jnp.asarray(NOISES[i : i + 1])
        state = sampler.step(denoise, state, here, there, lambda noise=noise: noise)
    expected = algorithm_2(*numbers, corrects=name == "heun")
    np.testing.assert_allclose(state.x[0], expected, rtol=1e-12)


def test_churn_asks_for_a_schedule():
    sampler, level = get_sampler("heun:s_churn=1"), level_at(jnp.asarray(1.0))
    state = init_state(jnp.ones((1, 2)), sampler=sampler)
    with pytest.raises(
        InputError, match=r"s_churn: got 1 without a schedule, expected the sampler"
    ):
        sampler.step(denoise, state, level, level, lambda: jnp.zeros((1, 2)))
