"""Step rules against exact solutions, in float64: orders, equivalences, guided Gaussians."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian, level_at, output_for, ratio_grid

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.predictions import Prediction
from jaxdiff.diffusion.timesteps import karras
from jaxdiff.guidance.denoiser import guided, stack_streams
from jaxdiff.guidance.rules import RULES
from jaxdiff.samplers.ddim import DDIM
from jaxdiff.samplers.loop import begin, sample
from jaxdiff.samplers.registry import SAMPLERS
from jaxdiff.samplers.rule import Carry

pytestmark = pytest.mark.usefixtures("x64")

# The order of each deterministic sampler on a grid whose steps change smoothly.
ORDERS = {"ddim": 1, "euler": 1, "pndm": 2, "dpmpp-2m": 2}
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
    return guided(network, (), stack_streams(conditioning), None, rule=RULES["none"], kind=kind)


def gaussian_flow(name, ratio, m=0.7, c=0.25):
    """The error of a sampler against the exact flow for data N(m, c) from the first ratio on."""
    both = jnp.array([m, m]), jnp.array([c, c])
    start = jnp.array([0.3, -1.1])
    keys = jax.vmap(jax.random.key)(jnp.array(KEYS, jnp.uint32))
    denoise = unguided(gaussian("v_prediction"), both, "v_prediction")
    grid = ratio_grid(ratio, jnp.float64)
    x = sample(denoise, start, grid, keys, sampler=SAMPLERS[name]) / grid.alpha[-1]
    first = start / grid.alpha[0]
    exact = m + (first - m) * np.sqrt((c + ratio[-1] ** 2) / (c + ratio[0] ** 2))
    return float(np.max(np.abs(x - exact)))


def order(steps, errors):
    """The power of 1 / n with which errors fall."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    steps = [20, 40, 80, 160, 320]
    errors = [gaussian_flow(name, karras(20.0, 0.02, n + 1)) for n in steps]
    assert order(steps, errors) == pytest.approx(ORDERS[name], abs=0.15)


def test_pndm_is_of_order_3_where_steps_are_equal():
    """Its weights are of order 4 there; what limits it are the first two steps."""
    steps = [40, 80, 160, 320]
    errors = [gaussian_flow("pndm", np.linspace(0.5, 0.05, n + 1)) for n in steps]
    assert order(steps, errors) == pytest.approx(3, abs=0.15)


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
    names = ("ddim", "euler", "dpmpp-2m")
    ddim, euler, solver = (one_step(SAMPLERS[name], *pair, x, x) for name in names)
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


def test_pndm_is_ddim_where_the_noise_is_always_the_same(keys):
    """Means of equal noises are that noise: what is left is the transfer of the paper, eq. 9."""
    eps = jnp.array([0.4, -1.3])

    def denoise(x, level, memory):
        return Prediction((x - level.sigma * eps) / level.alpha, eps), memory

    grid = ratio_grid(np.append(karras(14.6, 0.03, 7), 0), jnp.float64)
    start = jnp.array([0.2, 2.5])
    x, ddim = (sample(denoise, start, grid, keys, sampler=SAMPLERS[n]) for n in ("pndm", "ddim"))
    np.testing.assert_allclose(x, ddim, rtol=1e-13)
    for (a, s), (a1, s1) in itertools.pairwise(zip(grid.alpha, grid.sigma, strict=True)):
        start = a1 / a * start - (a1**2 - a**2) * eps / (a * (s1 * a + s * a1))
    np.testing.assert_allclose(x, start, rtol=1e-13)


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
    # A mean of noises is one of them up to rounding, for all others D itself is left.
    np.testing.assert_allclose(x, D, rtol=1e-14 if name == "pndm" else 0)


def test_ddim_refuses_an_eta_outside_its_range():
    with pytest.raises(InputError, match=r"eta: got 1\.5"):
        DDIM(eta=1.5)


def test_begin_scales_the_noise():
    grid = ratio_grid([2.0, 0.0])._replace(start=jnp.asarray(0.5))
    carry = begin(grid.start * jnp.array([2.0]), sampler=SAMPLERS["euler"])
    np.testing.assert_array_equal(carry.x, [1.0])


def guided_variance(name, w, a, b, ratio):
    """The variance at the end for p(x|c) = N(0, a) and p(x) = N(0, b), with no sampling error.

    A sampler is linear in its start and its noises. Image 0 starts at 1 and is given no noise,
    image i + 1 starts at 0 and is given 1 at step i: the variance is the sum of their squares.
    """
    n = len(ratio)
    both = (jnp.zeros(n), jnp.full(n, b)), (jnp.zeros(n), jnp.full(n, a))
    rule, scales = RULES["cfg"], jnp.full(n, w)
    denoise = guided(
        gaussian("v_prediction"), (), stack_streams(*both), scales, rule=rule, kind="v_prediction"
    )
    sampler, grid = SAMPLERS[name], ratio_grid(ratio, jnp.float64)

    def step(i, carry):
        ends = grid.level(i), grid.level(i + 1)
        return sampler.step(denoise, carry, *ends, lambda: jax.nn.one_hot(i + 1, n))

    first = begin(jax.nn.one_hot(0, n), sampler=sampler)
    return float(jnp.sum(jax.lax.fori_loop(0, n - 1, step, first).x ** 2))


# a, b, w and the variances of the guided ODE and SDE for an infinite start
VARIANCES = [
    (1.0, 2.0, 2.0, 0.5, 0.5833),
    (1.0, 2.0, 3.0, 0.25, 0.3875),
    (1.0, 2.0, 1.5, 0.7071, 0.75),
    (0.5, 3.0, 2.0, 0.083333, 0.199074),
]


# The order of those that draw noise is that of their variance.
WEAK_ORDERS = {"ddpm": 1, "euler-ancestral": 1}


@pytest.mark.parametrize("name", ORDERS | WEAK_ORDERS)
@pytest.mark.parametrize(("a", "b", "w", "ode", "sde"), VARIANCES)
def test_variance_of_a_guided_gaussian(name, a, b, w, ode, sde):
    coarse, fine = (
        guided_variance(name, w, a, b, np.append(karras(500.0, 0.002, n), 0)) for n in (500, 1000)
    )
    # Extrapolated to infinitely many steps by the order of the sampler.
    gain = 2.0 ** (ORDERS | WEAK_ORDERS)[name]
    variance = (gain * fine - coarse) / (gain - 1)
    assert variance == pytest.approx(ode if name in ORDERS else sde, rel=1e-3)


@pytest.mark.parametrize("name", [name for name, order in ORDERS.items() if order > 1])
@pytest.mark.parametrize(("a", "b", "w"), [row[:3] for row in VARIANCES])
def test_variance_of_the_guided_ode_over_a_finite_range(name, a, b, w, keys):
    high, low = 40.0, 0.05
    both = (jnp.zeros(2), jnp.full(2, b)), (jnp.zeros(2), jnp.full(2, a))
    denoise = guided(
        gaussian("v_prediction"),
        (),
        stack_streams(*both),
        jnp.full(2, w),
        rule=RULES["cfg"],
        kind="v_prediction",
    )
    grid = ratio_grid(karras(high, low, 801), jnp.float64)
    x = sample(denoise, jnp.ones(2), grid, keys, sampler=SAMPLERS[name])
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
        jnp.full(2, w),
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
