"""DDIM inversion: the exact inverse flow to first order, and back again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian, ratio_grid, unguided

from jaxdiff.checkpoints.timestep_grids import make_grid
from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.diffusion.grids import karras
from jaxdiff.diffusion.schedules import VPSchedule
from jaxdiff.samplers.base import SAMPLERS
from jaxdiff.samplers.inversion import invert
from jaxdiff.samplers.sampling import sample

pytestmark = pytest.mark.usefixtures("x64")

M, C = 0.7, 0.25
IMAGES = np.array([0.3, 1.9])


def denoiser():
    """The one for data N(M, C), for the two images."""
    return unguided(gaussian("v_prediction"), (jnp.full(2, M), jnp.full(2, C)), "v_prediction")


def ratios(n):
    """n steps to a clean image, which the last level before it nears as the others do theirs."""
    return np.append(karras(20.0, 0.8 / n, n), 0)


def order(error):
    steps = [40, 80, 160, 320]
    return -np.polyfit(np.log(steps), np.log([error(n) for n in steps]), 1)[0]


def test_the_noise_is_that_of_the_exact_flow_to_first_order(keys):
    def error(n):
        ratio = ratios(n)
        exact = M + (IMAGES - M) * np.sqrt((C + ratio[0] ** 2) / C)
        grid = ratio_grid(ratio, jnp.float64)
        noise = invert(denoiser(), jnp.asarray(IMAGES), grid)
        return np.max(np.abs(np.asarray(noise / grid.alpha[0, 0]) - exact))

    assert order(error) == pytest.approx(1, abs=0.15)


def test_there_and_back_is_the_same_image_to_first_order(keys):
    def error(n):
        grid = ratio_grid(ratios(n), jnp.float64)
        images = jnp.asarray(IMAGES)
        noise = invert(denoiser(), images, grid)
        back = sample(denoiser(), noise, grid, keys, sampler=SAMPLERS["ddim"])
        return np.max(np.abs(back - images))

    assert order(error) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("ratio", [[14.6, 0], [14.6, 3.0, 0.4, 0], [14.6, 3.0, 0.4, 0.03]])
def test_a_noise_that_does_not_depend_on_the_image_leads_back_exactly(ratio, keys):
    eps = jnp.array([0.4, -1.3], jnp.float64)

    def denoise(x, level, memory):
        return Prediction((x - level.sigma * eps) / level.alpha, eps), memory + 1

    grid = ratio_grid(ratio, jnp.float64)
    images = jnp.asarray(IMAGES)
    noise = invert(denoise, images, grid, guidance_state=jnp.zeros(2, jnp.int32))
    zero = jnp.zeros(2, jnp.int32)
    back = sample(denoise, noise, grid, keys, sampler=SAMPLERS["ddim"], guidance_state=zero)
    np.testing.assert_allclose(back, images, rtol=1e-13)


@pytest.mark.parametrize("zero", [False, True], ids=["sd", "zero-snr"])
@pytest.mark.parametrize("name", [k for k, each in SAMPLERS.items() if not each.stochastic])
def test_the_grids_of_samplers_lead_there_and_back(name, zero, keys):
    """Compiled, with the noise at the scale that `sample` begins from, whatever that is."""
    schedule = VPSchedule(beta_schedule="scaled_linear", zero_terminal_snr=zero)
    grid = make_grid(schedule, name, 200, prediction_type="v_prediction", spacing="trailing")

    def denoise(x, level, memory):
        D = level.alpha * x / (level.alpha**2 + level.sigma**2)  # for data N(0, 1)
        return Prediction(D, level.sigma * x), memory

    images = jnp.asarray(IMAGES, jnp.float32)
    noise = jax.jit(functools.partial(invert, denoise))(images, grid)
    # The flow of data N(0, 1) is x itself at any level.
    np.testing.assert_allclose(noise * grid.init_noise_sigma, images, rtol=2e-2)
    back = sample(denoise, noise, grid, keys, sampler=SAMPLERS["ddim"])
    np.testing.assert_allclose(back, images, rtol=2e-2)
