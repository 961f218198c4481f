"""Step rules in float64: the formulas of the papers, and what must be the same step."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import RATIO_SCHEDULE, level_at, output_for, ratio_grid, unguided

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.denoising import Prediction
from jaxdiff.diffusion.grids import karras
from jaxdiff.samplers.base import SAMPLERS, SamplingState, get_sampler, init_state
from jaxdiff.samplers.ddim import DDIM
from jaxdiff.samplers.ddpm import DDPM, VARIANCES
from jaxdiff.samplers.sampling import sample

pytestmark = pytest.mark.usefixtures("x64")


def one_step(sampler, here, there, x, z, variance=None):
    """One step from x with noise z and the denoiser D = tanh(x)."""

    def denoise(x, level, memory):
        D = jnp.tanh(x)
        return Prediction(D, (x - level.alpha * D) / level.sigma, variance), memory

    carry = SamplingState(
        x=x, x0=jnp.zeros_like(x), sampler_state=sampler.init(x), guidance_state=()
    )
    return sampler.step(denoise, carry, here, there, lambda: z).x


PAIRS = [(14.6, 9.0), (1.3, 0.9), (0.05, 0.029), (0.5, 0.0)]


@pytest.fixture(params=PAIRS, ids=str)
def pair(request, x64):
    return tuple(level_at(jnp.asarray(r, jnp.float64), ndim=1) for r in request.param)


def test_ode_solvers_begin_alike(pair):
    x = jnp.linspace(-2.0, 2.0, 9)
    ddim = one_step(SAMPLERS["ddim"], *pair, x, x)
    for name in ("euler", "dpmpp-2s", "dpmpp-2m", "unipc"):
        np.testing.assert_allclose(one_step(SAMPLERS[name], *pair, x, x), ddim, atol=1e-13)


def test_ancestral_samplers_begin_alike(pair):
    """DDPM is DDIM with eta 1, Euler ancestral and the first step of SDE-DPM-Solver++."""
    x, z = jnp.linspace(-2.0, 2.0, 9), jnp.linspace(1.0, -0.5, 9)
    ddpm = one_step(SAMPLERS["ddpm"], *pair, x, z)
    names = ("euler-ancestral", "dpmpp-2m-sde", "dpmpp-3m-sde")
    for sampler in (DDIM(eta=1.0), *(SAMPLERS[name] for name in names)):
        np.testing.assert_allclose(one_step(sampler, *pair, x, z), ddpm, atol=1e-13)


def test_euler_is_the_step_of_the_ode_in_the_ratio(pair):
    here, there = pair
    x = jnp.linspace(-2.0, 2.0, 9)
    r, r_next = here.sigma / here.alpha, there.sigma / there.alpha
    u = x / here.alpha
    expected = there.alpha * (u + (r_next - r) * (u - jnp.tanh(x)) / r)
    np.testing.assert_allclose(one_step(SAMPLERS["euler"], *pair, x, x), expected, atol=1e-13)


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
    large = jnp.where(there.sigma > 0, jnp.sqrt(1 - step), 0)
    got = one_step(DDPM(variance="fixed_large"), *pair, x, jnp.ones(9))
    np.testing.assert_allclose(got, mean + large, atol=1e-13)
    # 2102.09672, eq. 15, from one to the other and beyond
    learned = DDPM(variance="learned_range")
    output = jnp.array([-1, 1, -0.6, 0, 0.9, 0.3, 1.2, -1.2, 0.5])
    v = (1 + output) / 2
    log_small = jnp.log(jnp.where(there.sigma > 0, variance, 1))
    deviation = jnp.exp((v * jnp.log(1 - step) + (1 - v) * log_small) / 2)
    got = one_step(learned, *pair, x, jnp.ones(9), output)
    wanted = mean + jnp.where(there.sigma > 0, deviation, 0)
    np.testing.assert_allclose(got, wanted, atol=1e-13)
    got = one_step(DDPM(variance="learned"), *pair, x, jnp.ones(9), output**2)
    wanted = mean + jnp.where(there.sigma > 0, jnp.abs(output), 0)
    np.testing.assert_allclose(got, wanted, atol=1e-13)


def test_a_score_moves_the_mean_by_the_variance(pair):
    """That of the sampler where it is learned."""
    x, output = jnp.linspace(-2.0, 2.0, 9), jnp.linspace(-1.0, 1.0, 9)
    for variance in ("fixed_small", "learned_range"):
        plain = DDPM(variance=variance)
        moved = plain.with_score(lambda x, level: jnp.sin(x))
        noise = one_step(plain, *pair, x, jnp.ones(9), output) - one_step(
            plain, *pair, x, jnp.zeros(9), output
        )
        shift = one_step(moved, *pair, x, x, output) - one_step(plain, *pair, x, x, output)
        np.testing.assert_allclose(shift, noise**2 * jnp.sin(x), atol=1e-13)


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
    for (a, s), (a1, s1) in itertools.pairwise(zip(grid.alpha[0], grid.sigma[0], strict=True)):
        start = a1 / a * start - (a1**2 - a**2) * eps / (a * (s1 * a + s * a1))
    np.testing.assert_allclose(x, start, rtol=1e-13)


def test_the_second_step_of_2m_extrapolates():
    """Algorithm 2 of 2211.01095 by hand, with D = tanh(x) on three levels."""
    ratios = [3.0, 1.5, 0.6]
    first, second, third = (level_at(jnp.asarray(r), ndim=1) for r in ratios)
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


def test_heun_is_the_step_of_the_paper_and_the_first_of_pndm(pair):
    here, there = pair
    x = jnp.linspace(-2.0, 2.0, 9)
    r, r_next = here.sigma / here.alpha, there.sigma / there.alpha
    u = x / here.alpha
    d = (u - jnp.tanh(x)) / r
    expected = u + (r_next - r) * d
    if r_next > 0:
        d_next = (expected - jnp.tanh(there.alpha * expected)) / r_next
        expected = u + (r_next - r) * (d + d_next) / 2
    for name in ("heun", "pndm"):
        got = one_step(SAMPLERS[name], *pair, x, x)
        np.testing.assert_allclose(got, there.alpha * expected, atol=1e-13)


def test_3m_sde_is_exact_for_parabolas():
    """Where D is a parabola in lambda, the third step is the integral of the reverse SDE."""
    ratios = [3.0, 1.5, 0.6, 0.35]
    lam = [-np.log(r) for r in ratios]
    levels = [level_at(jnp.asarray(r), ndim=1) for r in ratios]
    sampler, x = SAMPLERS["dpmpp-3m-sde"], jnp.array([0.3, -1.1])

    def image(lam):
        return 0.4 - 0.7 * lam + 0.5 * lam**2

    def denoise(x, level, memory):
        D = image(jnp.log(level.alpha / level.sigma)) + jnp.zeros_like(x)
        return Prediction(D, (x - level.alpha * D) / level.sigma), memory

    carry = init_state(x, sampler=sampler)
    for here, there in itertools.pairwise(levels):
        x = carry.x
        carry = sampler.step(denoise, carry, here, there, lambda: jnp.zeros(2))
    nodes, weights = np.polynomial.legendre.leggauss(30)
    h = lam[3] - lam[2]
    u = (nodes + 1) * h / 2
    integral = np.sum(weights * 2 * np.exp(-2 * (h - u)) * image(lam[2] + u)) * h / 2
    expected = there.sigma / here.sigma * np.exp(-h) * x + there.alpha * integral
    np.testing.assert_allclose(carry.x, expected, atol=1e-13)


def along_a_noise(sampler, ratios, noise):
    """x / alpha after the steps of a sampler where the noise is a function of the ratio alone."""

    def denoise(x, level, memory):
        eps = noise(level.sigma / level.alpha) + jnp.zeros_like(x)
        return Prediction((x - level.sigma * eps) / level.alpha, eps), memory

    levels = [level_at(jnp.asarray(r), step=i, steps=20) for i, r in enumerate(ratios)]
    levels = [each._replace(alpha=each.alpha[0], sigma=each.sigma[0]) for each in levels]
    carry = init_state(jnp.array([0.3]), sampler=sampler.for_schedule(RATIO_SCHEDULE))
    ends = []
    for here, there in itertools.pairwise(levels):
        carry = sampler.step(denoise, carry, here, there, lambda: jnp.zeros(1))
        ends.append(float((carry.x / there.alpha)[0]))
    return ends


def test_lms_is_exact_for_cubics():
    """From its fourth step on x / alpha is the integral of a noise that is a cubic in the ratio."""
    ratios = [3.0, 2.0, 1.5, 0.8, 0.35, 0.0]
    ends = along_a_noise(SAMPLERS["lms"], ratios, lambda r: 0.4 - 0.7 * r + 0.5 * r**2 + 0.2 * r**3)

    def integral(r):
        return 0.4 * r - 0.35 * r**2 + 0.5 / 3 * r**3 + 0.05 * r**4

    for (r, r_next), (x, x_next) in zip(
        itertools.pairwise(ratios[3:]), itertools.pairwise(ends[2:]), strict=True
    ):
        assert x_next - x == pytest.approx(integral(r_next) - integral(r), abs=1e-13)


def test_deis_is_exact_for_lines_in_the_logarithm():
    ratios = [3.0, 2.0, 1.5, 0.8]
    ends = along_a_noise(SAMPLERS["deis"], ratios, lambda r: 0.4 - 0.7 * jnp.log(r))

    def integral(r):
        return 0.4 * r - 0.7 * (r * np.log(r) - r)

    for (r, r_next), (x, x_next) in zip(
        itertools.pairwise(ratios[1:]), itertools.pairwise(ends), strict=True
    ):
        assert x_next - x == pytest.approx(integral(r_next) - integral(r), abs=1e-13)


@pytest.mark.parametrize("name", ["kdpm2", "kdpm2-ancestral"])
def test_kdpm2_is_the_step_of_the_paper(name, pair):
    here, there = pair
    x, z = jnp.linspace(-2.0, 2.0, 9), jnp.linspace(1.0, -0.5, 9)
    r, r_next = here.sigma / here.alpha, there.sigma / there.alpha
    up = r_next * jnp.sqrt(1 - r_next**2 / r**2) if name == "kdpm2-ancestral" else 0
    down = jnp.sqrt(r_next**2 - up**2)
    u = x / here.alpha
    d = (u - jnp.tanh(x)) / r
    expected = u + (down - r) * d
    if r_next > 0:
        middle = jnp.exp((jnp.log(r) + jnp.log(down)) / 2)
        at = u + (middle - r) * d
        expected = u + (down - r) * (at - jnp.tanh(at / jnp.sqrt(1 + middle**2))) / middle
    got = one_step(SAMPLERS[name].for_schedule(RATIO_SCHEDULE), *pair, x, z)
    np.testing.assert_allclose(got, there.alpha * (expected + up * z), atol=1e-13)


def test_tcd_is_ddim_without_noise_and_consistency_sampling_with_all(pair):
    here, there = pair
    x, z = jnp.linspace(-2.0, 2.0, 9), jnp.linspace(1.0, -0.5, 9)
    ends = [
        one_step(get_sampler(f"tcd:eta={eta}").for_schedule(RATIO_SCHEDULE), here, there, x, z)
        for eta in (0, 1)
    ]
    np.testing.assert_allclose(ends[0], one_step(DDIM(), here, there, x, z), atol=1e-13)
    np.testing.assert_allclose(ends[1], there.alpha * jnp.tanh(x) + there.sigma * z, atol=1e-13)


def test_lcm_lands_on_the_consistency_function():
    """Its last step keeps c_skip of x: the nearer to t = 0, the more."""
    here, there = (level_at(jnp.asarray(r), ndim=1) for r in (0.05, 0.0))
    x = jnp.linspace(-2.0, 2.0, 9)
    c_skip = 0.25 / (0.5**2 + 0.25)
    expected = c_skip * x + 0.5 / np.sqrt(0.5**2 + 0.25) * jnp.tanh(x)
    np.testing.assert_allclose(one_step(SAMPLERS["lcm"], here, there, x, x), expected, atol=1e-14)


D = (0.3, -1.7)


@functools.cache
def towards(name):
    """The compiled sampler for data that is always D."""

    def denoise(x, level, memory):
        constant = jnp.array(D)
        return Prediction(constant, (x - level.alpha * constant) / level.sigma), memory

    sampler = get_sampler(name).for_schedule(RATIO_SCHEDULE)
    return jax.jit(functools.partial(sample, denoise, sampler=sampler))


@pytest.mark.parametrize("high", [14.6, np.inf], ids=["sd", "zero-snr"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(
    "name", [*(name for name, each in SAMPLERS.items() if each.order), "heun:s_churn=2"]
)
def test_a_constant_image_is_reached_exactly(name, steps, high, keys):
    ratio = np.append(np.geomspace(14.6, 0.03, steps), 0)
    ratio[0] = high
    x = towards(name)(jnp.array([0.2, 2.5]), ratio_grid(ratio, jnp.float64, length=5), keys)
    # A mean of equal noises is one of them up to rounding, for all others D itself is left.
    np.testing.assert_allclose(x, D, rtol=1e-13 if name in ("pndm", "lms") else 0)


def test_ddim_refuses_an_eta_outside_its_range():
    with pytest.raises(InputError, match=r"eta: got 1\.5"):
        DDIM(eta=1.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ddim:phi=1", "sampler: ddim: got 'phi', expected one of eta"),
        ("ddim:eta=high", "sampler: eta: got 'high', expected a number"),
        ("lcm:eta=1", "sampler: lcm: got 'eta', expected no options"),
        ("heun:schedule=1", "sampler: heun: got 'schedule', expected one of s_churn, s_tmin"),
        ("heun:s_churn=-1", r"s_churn: got -1\.0, expected a number from 0"),
        ("heun:churn=1,s_churn=1", "got churn and s_churn, two names of one option"),
    ],
)
def test_bad_options_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        get_sampler(text)


def test_options_are_read_from_the_description():
    assert get_sampler("ddim: eta = 0.5") == DDIM(eta=0.5) == get_sampler("ddim", 0.5)
    assert get_sampler("ddpm:variance=fixed_large") == DDPM(variance="fixed_large")
    with pytest.raises(
        InputError, match=r"eta: got 0\.5 with sampler 'ddim:eta=1', expected it once"
    ):
        get_sampler("ddim:eta=1", 0.5)


def test_ddpm_knows_four_variances(pair):
    with pytest.raises(InputError, match="variance: got 'fixed'"):
        DDPM(variance="fixed")
    learned = [name for name in VARIANCES if DDPM(variance=name).reads_variance]
    assert learned == ["learned_range", "learned"]
    for name in learned:
        with pytest.raises(InputError, match=f"got {name} for a network that learns no variance"):
            one_step(DDPM(variance=name), *pair, jnp.ones(2), jnp.ones(2))


def test_begin_scales_the_noise():
    grid = ratio_grid([2.0, 0.0])._replace(init_noise_sigma=jnp.asarray([0.5]))
    carry = init_state(grid.init_noise_sigma * jnp.array([2.0]), sampler=SAMPLERS["euler"])
    np.testing.assert_array_equal(carry.x, [1.0])


def test_samplers_are_hashable_choices():
    for sampler in SAMPLERS.values():
        assert hash(sampler) == hash(dataclasses.replace(sampler))
