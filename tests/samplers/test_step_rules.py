"""Step rules against exact solutions, in float64: orders, equivalences, guided Gaussians."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian, level_at, output_for, ratio_grid

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.predictions import Prediction
from jaxdiff.diffusion.timesteps import karras
from jaxdiff.guidance.denoiser import guided, stack_streams
from jaxdiff.guidance.registry import RULES
from jaxdiff.guidance.rule import Dials
from jaxdiff.samplers.ddim import DDIM
from jaxdiff.samplers.loop import begin, sample
from jaxdiff.samplers.registry import SAMPLERS
from jaxdiff.samplers.rule import Carry

pytestmark = pytest.mark.usefixtures("x64")

DETERMINISTIC = ("ddim", "euler", "dpmpp-2m")
KEYS = (1, 2)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def keys(x64):
    return jax.vmap(jax.random.key)(jnp.array(KEYS, jnp.uint32))


def unguided(network, conditioning, kind="epsilon"):
    """The denoiser of a network with conditioning (b,) leaves and no guidance."""
    dials = Dials(jnp.ones(2))
    return guided(network, (), stack_streams(conditioning), dials, rule=RULES["none"], kind=kind)


def gaussian_flow(name, steps, m=0.7, c=0.25, high=20.0, low=0.02):
    """The error of a sampler against the exact flow for data N(m, c) from ratio `high` to `low`."""
    ratio = karras(high, low, steps + 1)
    both = jnp.array([m, m]), jnp.array([c, c])
    start = jnp.array([0.3, -1.1])
    keys = jax.vmap(jax.random.key)(jnp.array(KEYS, jnp.uint32))
    denoise = unguided(gaussian("v_prediction"), both, "v_prediction")
    grid = ratio_grid(ratio, jnp.float64)
    x = sample(denoise, start, grid, keys, sampler=SAMPLERS[name]) / grid.alpha[-1]
    first = start / grid.alpha[0]
    exact = m + (first - m) * np.sqrt((c + low**2) / (c + high**2))
    return float(np.max(np.abs(x - exact)))


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("dpmpp-2m", 2)])
def test_order_of_convergence(name, order):
    steps = [20, 40, 80, 160, 320]
    errors = [gaussian_flow(name, n) for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.15)


def one_step(sampler, here, there, x, z, previous=None):
    """One step from x with noise z and the denoiser D = tanh(x)."""

    def denoise(x, level, memory):
        D = jnp.tanh(x)
        return Prediction(D, (x - level.alpha * D) / level.sigma), memory

    carry = Carry(x=x, x0=jnp.zeros_like(x), history=sampler.init(x), memory=())
    return sampler.step(denoise, carry, here, there, lambda: z).x


PAIRS = [(14.6, 9.0), (1.3, 0.9), (0.05, 0.029), (0.5, 0.0)]


@pytest.fixture(params=PAIRS, ids=str)
def pair(request, x64):
    return tuple(level_at(jnp.asarray(r, jnp.float64)) for r in request.param)


def test_euler_is_ddim_is_first_order_dpm_solver(pair):
    x = jnp.linspace(-2.0, 2.0, 9)
    ddim, euler, solver = (one_step(SAMPLERS[name], *pair, x, x) for name in DETERMINISTIC)
    np.testing.assert_allclose(euler, ddim, atol=1e-14)
    np.testing.assert_allclose(solver, ddim, atol=1e-14)


def test_euler_is_the_step_of_the_ode_in_the_ratio(pair):
    here, there = pair
    x = jnp.linspace(-2.0, 2.0, 9)
    r, r_next = here.sigma / here.alpha, there.sigma / there.alpha
    u = x / here.alpha
    expected = there.alpha * (u + (r_next - r) * (u - jnp.tanh(x)) / r)
    np.testing.assert_allclose(one_step(SAMPLERS["euler"], *pair, x, x), expected, atol=1e-13)


def test_ddpm_is_ddim_with_eta_one_in_mean_and_variance(pair):
    x, ddpm, ddim = jnp.linspace(-2.0, 2.0, 9), SAMPLERS["ddpm"], DDIM(eta=1.0)
    mean, mean_ddim = (one_step(s, *pair, x, jnp.zeros(9)) for s in (ddpm, ddim))
    np.testing.assert_allclose(mean_ddim, mean, atol=1e-14)
    noisy, noisy_ddim = (one_step(s, *pair, x, jnp.ones(9)) for s in (ddpm, ddim))
    np.testing.assert_allclose(noisy_ddim - mean_ddim, noisy - mean, atol=1e-14)


def test_ddpm_is_the_formula_of_the_paper(pair):
    here, there = pair
    x = jnp.linspace(-2.0, 2.0, 9)
    step = here.alpha**2 / there.alpha**2
    mean = (
        there.alpha * (1 - step) / here.sigma**2 * jnp.tanh(x)
        + jnp.sqrt(step) * there.sigma**2 / here.sigma**2 * x
    )
    variance = there.sigma**2 / here.sigma**2 * (1 - step)
    got = one_step(SAMPLERS["ddpm"], *pair, x, jnp.ones(9))
    np.testing.assert_allclose(got, mean + jnp.sqrt(variance), atol=1e-13)


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_ddim_is_the_formula_of_the_paper(pair, eta):
    here, there = pair
    x = jnp.linspace(-2.0, 2.0, 9)
    D = jnp.tanh(x)
    eps = (x - here.alpha * D) / here.sigma
    c = eta * there.sigma / here.sigma * jnp.sqrt(1 - here.alpha**2 / there.alpha**2)
    expected = there.alpha * D + jnp.sqrt(there.sigma**2 - c**2) * eps + c
    got = one_step(DDIM(eta=eta), *pair, x, jnp.ones(9))
    np.testing.assert_allclose(got, expected, atol=1e-13)


def test_the_second_step_of_2m_extrapolates():
    """Algorithm 2 of 2211.01095 by hand, with D = tanh(x) on three levels."""
    ratios = [3.0, 1.5, 0.6]
    first, second, third = (level_at(jnp.asarray(r)) for r in ratios)
    x = jnp.linspace(-2.0, 2.0, 9)
    lam = [-np.log(r) for r in ratios]
    h0, h = lam[1] - lam[0], lam[2] - lam[1]
    D0 = jnp.tanh(x)
    x1 = second.sigma / first.sigma * x - second.alpha * np.expm1(-h0) * D0
    D1 = jnp.tanh(x1)
    Dd = D1 + (D1 - D0) / (2 * h0 / h)
    expected = third.sigma / second.sigma * x1 - third.alpha * np.expm1(-h) * Dd

    def network(weights, x, t, conditioning):
        return output_for("epsilon", jnp.tanh(x), x, t)

    grid = ratio_grid(ratios, jnp.float64)
    keys = jax.vmap(jax.random.key)(jnp.arange(9, dtype=jnp.uint32))
    denoise = unguided(network, None)
    got = sample(denoise, x, grid, keys, sampler=SAMPLERS["dpmpp-2m"])
    np.testing.assert_allclose(got, expected, atol=1e-13)


@pytest.mark.parametrize("high", [14.6, np.inf], ids=["sd", "zero-snr"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_constant_image_is_reached_exactly(name, steps, high, keys):
    D = jnp.array([0.3, -1.7])

    def denoise(x, level, memory):
        return Prediction(D, (x - level.alpha * D) / level.sigma), memory

    ratio = np.append(np.geomspace(14.6, 0.03, steps), 0)
    ratio[0] = high
    start = jnp.array([0.2, 2.5])
    x = sample(denoise, start, ratio_grid(ratio, jnp.float64), keys, sampler=SAMPLERS[name])
    np.testing.assert_array_equal(x, D)


def test_ddim_refuses_an_eta_outside_its_range():
    with pytest.raises(InputError, match=r"eta: got 1\.5"):
        DDIM(eta=1.5)


def test_begin_scales_the_noise():
    grid = ratio_grid([2.0, 0.0])._replace(start=jnp.asarray(0.5))
    carry = begin(grid.start * jnp.array([2.0]), sampler=SAMPLERS["euler"])
    np.testing.assert_array_equal(carry.x, [1.0])


def guided_variance(name, w, a, b, ratio):
    """The variance at the end for p(x|c) = N(0, a) and p(x) = N(0, b), with no sampling error.

    Every step is linear, x' = A x + B z, and two images find both: one starts it at 1 and is given
    no noise, the other at 0 with noise 1. The variance then goes to A^2 variance + B^2.
    """
    both = (jnp.zeros(2), jnp.full(2, b)), (jnp.zeros(2), jnp.full(2, a))
    rule, dials = RULES["cfg"], Dials(jnp.full(2, w))
    denoise = guided(
        gaussian("v_prediction"), (), stack_streams(*both), dials, rule=rule, kind="v_prediction"
    )
    sampler, grid = SAMPLERS[name], ratio_grid(ratio, jnp.float64)

    def step(carry, i):
        state, variance = carry
        state = state._replace(x=jnp.array([1.0, 0.0]))
        after = sampler.step(
            denoise, state, grid.level(i), grid.level(i + 1), lambda: jnp.array([0.0, 1.0])
        )
        A, B = after.x
        return (after, A**2 * variance + B**2), None

    first = begin(jnp.zeros(2), sampler=sampler)
    (_, variance), _ = jax.lax.scan(step, (first, jnp.asarray(1.0)), jnp.arange(len(ratio) - 1))
    return float(variance)


# a, b, w and the variances of the guided ODE and SDE for an infinite start
VARIANCES = [
    (1.0, 2.0, 2.0, 0.5, 0.5833),
    (1.0, 2.0, 3.0, 0.25, 0.3875),
    (1.0, 2.0, 1.5, 0.7071, 0.75),
    (0.5, 3.0, 2.0, 0.083333, 0.199074),
]


@pytest.mark.parametrize(("a", "b", "w", "ode", "sde"), VARIANCES)
def test_variance_of_a_guided_gaussian(a, b, w, ode, sde):
    for name, expected in (("ddim", ode), ("euler", ode), ("ddpm", sde)):
        coarse, fine = (
            guided_variance(name, w, a, b, np.append(karras(500.0, 0.002, n), 0))
            for n in (500, 1000)
        )
        # These are of first order: extrapolated to infinitely many steps.
        assert 2 * fine - coarse == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("a", "b", "w"), [row[:3] for row in VARIANCES])
def test_variance_of_the_guided_ode_over_a_finite_range(a, b, w, keys):
    high, low = 40.0, 0.05
    both = (jnp.zeros(2), jnp.full(2, b)), (jnp.zeros(2), jnp.full(2, a))
    denoise = guided(
        gaussian("v_prediction"),
        (),
        stack_streams(*both),
        Dials(jnp.full(2, w)),
        rule=RULES["cfg"],
        kind="v_prediction",
    )
    grid = ratio_grid(karras(high, low, 801), jnp.float64)
    x = sample(denoise, jnp.ones(2), grid, keys, sampler=SAMPLERS["dpmpp-2m"])
    gain = (x / grid.alpha[-1]) ** 2 * grid.alpha[0] ** 2
    exact = ((a + low**2) / (a + high**2)) ** w * ((b + low**2) / (b + high**2)) ** (1 - w)
    np.testing.assert_allclose(gain, exact, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_moves_the_mean_of_equal_gaussians_to_w(name, keys):
    """N(m_c, v) guided against N(m_u, v) ends at w m_c + (1 - w) m_u, by the ODE and the SDE."""
    w, mc, mu, v = 3.0, 1.0, 0.4, 0.3
    both = (jnp.full(2, mu), jnp.full(2, v)), (jnp.full(2, mc), jnp.full(2, v))
    denoise = guided(
        gaussian("epsilon"),
        (),
        stack_streams(*both),
        Dials(jnp.full(2, w)),
        rule=RULES["cfg"],
        kind="epsilon",
    )
    # Without noise and from 0 every step is that of the mean.
    sampler = SAMPLERS[name]
    grid = ratio_grid(np.append(karras(500.0, 0.01, 400), 0), jnp.float64)

    def step(i, carry):
        return sampler.step(denoise, carry, grid.level(i), grid.level(i + 1), lambda: jnp.zeros(2))

    carry = jax.lax.fori_loop(0, grid.steps, step, begin(jnp.zeros(2), sampler=sampler))
    np.testing.assert_allclose(carry.x, w * mc + (1 - w) * mu, rtol=2e-2)


def test_samplers_are_hashable_choices():
    for sampler in SAMPLERS.values():
        assert hash(sampler) == hash(dataclasses.replace(sampler))
