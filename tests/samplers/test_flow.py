"""Flows: each sampler on one and on its variance-preserving view, and the SDE of free noise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import level_at, posterior_mean
from scipy.integrate import solve_ivp
from scipy.special import ndtr

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.denoising import NoiseLevel, Prediction, alpha_sigma_from_edm, target
from jaxdiff.diffusion.grids import HostTimestepGrid, TimestepGrid
from jaxdiff.diffusion.schedules import FlowSchedule
from jaxdiff.guidance.base import RULES, GuidanceScales
from jaxdiff.guidance.denoiser import guided_denoiser, stack_streams
from jaxdiff.samplers.base import SAMPLERS, SamplingState, get_sampler, sample
from jaxdiff.samplers.flow_sde import DIFFUSIONS

FLOW = FlowSchedule(time_scale=1.0)
MEANS, VARIANCES, WEIGHTS = (-2.0, 2.0), (0.25, 0.04), (0.3, 0.7)


@dataclasses.dataclass(frozen=True)
class VPView:
    """The noise levels of a flow at its times, with alpha^2 + sigma^2 = 1."""

    num_discrete: int | None = None

    def alpha_sigma(self, t):
        """The point of the flow's path, divided by its length."""
        alpha, sigma = FLOW.alpha_sigma(t)
        length = (alpha**2 + sigma**2) ** 0.5
        return alpha / length, sigma / length

    def derivatives(self, t):
        """Not asked for."""
        raise NotImplementedError

    def time_of(self, sigma_edm):
        """That of the flow."""
        return FLOW.time_of(sigma_edm)

    def level_of(self, sigma_edm):
        """The time and the level."""
        return self.time_of(sigma_edm), *alpha_sigma_from_edm(sigma_edm)


def network(schedule, kind):
    """The exact network of the mixture, whose conditioning is the weights of its components."""

    def call(weights, x, t, conditioning):
        alpha, sigma = (level[:, None] for level in schedule.alpha_sigma(t))
        D = posterior_mean(x, alpha, sigma, MEANS, VARIANCES, conditioning)
        return target(kind, D, (x - alpha * D) / sigma, alpha, sigma)

    return call


@functools.partial(jax.jit, static_argnames=("name", "schedule", "kind"))
def run(name, schedule, kind, x, grid, keys):
    """x at the end of a grid, guided by 2 from the whole mixture to one component."""
    rows = [jnp.broadcast_to(jnp.array(w), (len(x), 2)) for w in (WEIGHTS, (0.0, 1.0))]
    denoise = guided_denoiser(
        network(schedule, kind),
        (),
        stack_streams(*rows),
        GuidanceScales(jnp.full(len(x), 2.0)),
        rule=RULES["cfg"],
        prediction_type=kind,
    )
    sampler = get_sampler(name).for_schedule(schedule)
    return sample(denoise, x, grid, keys, sampler=sampler)


def grid_of(schedule, t):
    return TimestepGrid.from_host(
        HostTimestepGrid(t, *schedule.alpha_sigma(t), 1.0), dtype=jnp.float64
    )


# LCM is not in it: its consistency function keeps a share of x, which depends on the scale of x.
VIEWED = [name for name in SAMPLERS if name != "lcm"]
VIEWED += ["ddim:eta=1", "euler:s_churn=2", "heun:s_churn=2", "pndm:skip_prk_steps=false"]
VIEWED += [f"flow-sde:k=0.5,diffusion={name}" for name in DIFFUSIONS]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("first", [1.0, 0.9], ids=["noise", "image-to-image"])
@pytest.mark.parametrize("name", VIEWED)
def test_a_flow_is_sampled_as_its_variance_preserving_view(name, first, keys):
    """Networks of the velocity and of v say the same of x and of x / |(alpha, sigma)|."""
    t = first * FlowSchedule(time_scale=1.0, shift=2.0).shifted(np.linspace(1, 0, 9))
    x = jnp.array([[0.3, -1.1], [1.7, 0.2]])
    ends = []
    for schedule, kind in ((FLOW, "flow_prediction"), (VPView(), "v_prediction")):
        length = np.hypot(1 - first, first) if schedule is not FLOW else 1.0
        ends.append(run(name, schedule, kind, x / length, grid_of(schedule, t), keys))
    assert np.all(np.isfinite(ends[0]))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-9, atol=1e-9)


# The SDE


def level(s, vp=False):
    """The levels of a flow at s, for x with one axis; or those of its variance-preserving view."""
    s = jnp.atleast_1d(jnp.asarray(s))
    length = jnp.sqrt((1 - s) ** 2 + s**2) if vp else 1.0
    return level_at(jnp.ones(1), ndim=1)._replace(t=s, alpha=(1 - s) / length, sigma=s / length)


def step(sampler, here: NoiseLevel, there: NoiseLevel, x, z, D):
    """x after one step with noise z, of the image D."""

    def denoise(x, level, state):
        return Prediction(D, (x - level.alpha * D) / level.sigma), state

    state = SamplingState(x=x, x0=D, sampler_state=(), guidance_state=())
    return sampler.step(denoise, state, here, there, lambda: z).x


SQUARES = {
    "sigma": lambda k, s: 2 * k * s,
    "reverse": lambda k, s: 2 * k * s / (1 - s),
    "quadratic": lambda k, s: 2 * k * s**2,
}
SDES = [(name, k) for name in SQUARES for k in (0.3, 1.0, 2.5)]


def test_there_is_a_formula_for_each_diffusion():
    assert SQUARES.keys() == DIFFUSIONS.keys()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("vp", [False, True])
@pytest.mark.parametrize(("name", "k"), SDES)
@pytest.mark.parametrize("s", [0.8, 0.2])
def test_a_small_step_has_the_drift_and_the_variance_of_the_sde(name, k, s, vp):
    """Euler-Maruyama's, for X = x / (alpha + sigma)."""
    h, x, D = 1e-7, jnp.array([0.7]), jnp.array([-0.4])
    sampler = get_sampler(f"flow-sde:k={k},diffusion={name}")
    here, there = level(s, vp), level(s - h, vp)
    scales = [float(each.alpha[0] + each.sigma[0]) for each in (here, there)]
    mean = float(step(sampler, here, there, scales[0] * x, jnp.zeros(1), D)[0]) / scales[1]
    moved = float(step(sampler, here, there, scales[0] * x, jnp.ones(1), D)[0]) / scales[1] - mean
    eps, square = (0.7 + 0.4 * (1 - s)) / s, SQUARES[name](k, s)
    assert (mean - 0.7) / h == pytest.approx(-0.4 - eps - square / 2 * eps / s, rel=1e-4)
    assert moved**2 / h == pytest.approx(square, rel=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ends", [(1.0, 0.9), (0.6, 0.4), (0.1, 0.0)])
def test_it_is_euler_without_noise_and_ancestral_as_the_reversed_process(ends):
    here, there = map(level, ends)
    x, z, D = (jnp.array([value]) for value in (0.7, -1.3, 0.4))
    pairs = (("flow-sde:k=0", "euler"), ("flow-sde:diffusion=reverse", "euler-ancestral"))
    for name, other in pairs:
        got = step(get_sampler(name), here, there, x, z, D)
        expected = step(get_sampler(other), here, there, x, z, D)
        np.testing.assert_allclose(got, expected, atol=1e-14)


def variance_at_the_end(name, steps, denoised, variance=1.0):
    """Of X at s = 0, exactly, for D = denoised(s) x; it is `variance` at s = 1."""
    s, zero = np.linspace(1, 0, steps + 1), jnp.zeros(steps)
    ends, D = (level(s[:-1]), level(s[1:])), jnp.asarray(denoised(s[:-1]))
    sampler = get_sampler(name)
    slopes = np.asarray(step(sampler, *ends, zero + 1, zero, D))
    noises = np.asarray(step(sampler, *ends, zero, zero + 1, zero))
    for slope, added in zip(slopes, noises, strict=True):
        variance = slope**2 * variance + added**2
    return variance


def image_gain(v):
    """E[x0 | x] / x of data N(0, v)."""
    return lambda s: (1 - s) * v / ((1 - s) ** 2 * v + s**2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "k"), [("sigma", 0.5), ("sigma", 1.0), ("quadratic", 2.0)])
def test_marginals_do_not_depend_on_the_noise_and_errors_fall_with_the_steps(name, k):
    v, text = 0.25, f"flow-sde:k={k},diffusion={name}"
    errors = [variance_at_the_end(text, n, image_gain(v)) - v for n in (50, 100, 200)]
    assert np.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.15)
    assert abs(errors[2]) < 0.1 * v


def guided_variance(a, b, w, square):
    """Of X at s = 0, by the ordinary equation of the variance of a linear SDE."""

    def slope(tau, V):
        s, g2 = 1 - tau, square(1 - tau)
        drift = 0.0
        for weight, v in ((w, a), (1 - w, b)):
            spread = tau**2 * v + s**2
            drift += weight * (tau * v - s - g2 / 2) / spread
        return 2 * drift * V + g2

    return solve_ivp(slope, (0, 1), [1.0], rtol=1e-10, atol=1e-12, method="LSODA").y[0, -1]


def test_the_equation_of_the_guided_variance_has_the_known_ends():
    """Without noise a^w b^(1 - w); with infinitely much the product of powers, 1 / (w/a + ...)."""
    a, b, w = 1.0, 2.0, 2.0
    assert guided_variance(a, b, w, lambda s: 0.0) == pytest.approx(0.5, rel=1e-7)
    assert guided_variance(a, b, w, lambda s: 4e3) == pytest.approx(2 / 3, rel=2e-3)
    assert guided_variance(a, b, w, lambda s: 2 * s / max(1 - s, 1e-9)) == pytest.approx(
        0.5833, abs=1e-4
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("a", "b", "w"), [(1.0, 2.0, 2.0), (0.5, 3.0, 2.0)])
def test_guided_marginals_depend_on_the_noise(a, b, w, k):
    """More of it spreads samples more, from a^w b^(1 - w) on. Extrapolated to endless steps."""

    def gain(s):
        return w * image_gain(a)(s) + (1 - w) * image_gain(b)(s)

    coarse, middle, fine = (
        variance_at_the_end(f"flow-sde:k={k}", n, gain) for n in (100, 200, 400)
    )
    extrapolated = (8 * fine - 6 * middle + coarse) / 3
    expected = guided_variance(a, b, w, lambda s: 2 * k * s)
    assert extrapolated == pytest.approx(expected, rel=3e-3)
    if k:
        assert expected > 1.02 * a**w * b ** (1 - w)


@pytest.mark.parametrize(
    "name", ["flow-sde:k=0", "flow-sde", "flow-sde:k=3", "flow-sde:diffusion=quadratic"]
)
def test_the_samples_of_a_mixture_are_the_mixture(name):
    n = 20_000
    keys = jax.vmap(jax.random.key)(jnp.arange(n, dtype=jnp.uint32))
    x = jax.random.normal(jax.random.key(7), (n, 1))
    denoise = guided_denoiser(
        network(FLOW, "flow_prediction"),
        (),
        jnp.broadcast_to(jnp.array(WEIGHTS), (n, 1, 2)),
        GuidanceScales(jnp.ones(n)),
        rule=RULES["none"],
        prediction_type="flow_prediction",
    )
    t = np.linspace(1, 0, 201)
    grid = TimestepGrid.from_host(HostTimestepGrid(t, *FLOW.alpha_sigma(t), 1.0))
    program = jax.jit(functools.partial(sample, denoise, sampler=get_sampler(name)))
    found = np.sort(np.asarray(program(x, grid, keys), np.float64)[:, 0])
    z = (found[:, None] - np.array(MEANS)) / np.sqrt(VARIANCES)
    cdf = (np.array(WEIGHTS) * ndtr(z)).sum(1)
    empirical = (np.arange(n) + 0.5) / n
    assert np.max(np.abs(cdf - empirical)) < 1.95 / np.sqrt(n) + 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flow-sde:k=-1", r"k: got -1\.0, expected a number from 0"),
        ("flow-sde:diffusion=white", "diffusion: got 'white', expected one of sigma, reverse"),
    ],
)
def test_bad_options_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        get_sampler(text)
