"""How fast samplers converge, and what guided ones converge to, against closed forms in float64.

Programs take the numbers of an example as arguments: a sampler is compiled once for all examples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import RATIO_SCHEDULE, gaussian, levels, ratio_grid, unguided

from jaxdiff.diffusion.denoising import Prediction, alpha_sigma_from_edm
from jaxdiff.diffusion.grids import HostTimestepGrid, TimestepGrid, karras
from jaxdiff.diffusion.schedules import EDMSchedule, FlowSchedule
from jaxdiff.guidance.base import RULES, GuidanceScales, parse
from jaxdiff.guidance.denoiser import guided_denoiser, stack_streams
from jaxdiff.samplers.base import SAMPLERS, get_sampler, init_state, run_steps, sample
from jaxdiff.samplers.inpainting import InpaintingMask

pytestmark = pytest.mark.usefixtures("x64")

# Of those that are none, LCM asks for the end of the ODE, not for its direction.
SOLVERS = {name: each.order for name, each in SAMPLERS.items() if each.order is not None}
ORDERS = {name: order for name, order in SOLVERS.items() if not SAMPLERS[name].stochastic}
WEAK_ORDERS = {name: order for name, order in SOLVERS.items() if SAMPLERS[name].stochastic}
# Noise that an option asks for keeps the marginals, so that the order is that of the step.
DRAWING = {
    f"{name}:{option}=1": ORDERS[name]
    for name in ORDERS
    for option in SAMPLERS[name].stochastic_options
} | {f"{name}:s_churn=20": ORDERS[name] for name in ORDERS if hasattr(SAMPLERS[name], "s_churn")}
M, C = 0.7, 0.25  # mean and variance of the data


def gaussian_flow(name, ratio, keys, longest):
    """The error of a sampler against the exact flow for data N(M, C) from the first ratio on."""
    start, alpha = jnp.array([0.3, -1.1]), alpha_sigma_from_edm(ratio)[0]
    grid = ratio_grid(ratio, jnp.float64, length=longest)
    x = end(name, plain_gaussian, (), start, grid, keys) / alpha[-1]
    first = start / alpha[0]
    exact = M + (first - M) * np.sqrt((C + ratio[-1] ** 2) / (C + ratio[0] ** 2))
    return float(np.max(np.abs(x - exact)))


def order(steps, errors):
    """The power of 1 / n with which errors fall."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def check_order(name, measured, tolerance):
    """LMS is of order 4 after its first steps, whose errors count the less the noisier they are."""
    highest = 4 if name == "lms" else ORDERS[name]
    assert ORDERS[name] - tolerance < measured < highest + tolerance


def guided_gaussian(n, a, b, w, *, kind="v_prediction", rule=RULES["cfg"], means=(0.0, 0.0)):
    """The denoiser for p(x|c) = N(0, a) guided by w against p(x) = N(0, b), for n images."""
    mean, null_mean = means
    null, cond = ((jnp.full(n, m), jnp.full(n, v)) for m, v in ((null_mean, b), (mean, a)))
    scales = GuidanceScales(jnp.full(n, w))
    streams = stack_streams(null, cond)
    return guided_denoiser(gaussian(kind), (), streams, scales, rule=rule, prediction_type=kind)


def plain_gaussian(n):
    """The denoiser for data N(M, C), for n images."""
    data = jnp.full(n, M), jnp.full(n, C)
    return unguided(gaussian("v_prediction"), data, "v_prediction")


@functools.partial(jax.jit, static_argnames=("name", "denoiser", "phase"))
def end(name, denoiser, data, start, grid, keys, phase=None):
    """Where a sampler brings `start` with denoiser(n, *data)."""
    phases = {} if phase is None else {"guidance_phase": phase}
    denoise = denoiser(len(start), *data)
    sampler = get_sampler(name).for_schedule(RATIO_SCHEDULE)
    return sample(denoise, start, grid, keys, sampler=sampler, **phases)


@functools.partial(jax.jit, static_argnames=("name", "denoiser"))
def squares(name, denoiser, data, grid, m, variance):
    """What `moments` says, of a compiled program."""
    n = grid.alpha.shape[1] + 1
    sampler = get_sampler(name).for_schedule(RATIO_SCHEDULE)
    denoise, rows = denoiser(n, *data), grid.for_images(n)

    def step(i, carry):
        ends = (rows.level(jnp.full(n, j), 1) for j in (i, i + 1))
        return sampler.step(denoise, carry, *ends, lambda: jax.nn.one_hot(i + 1, n))

    start = grid.alpha[0, 0] * m + jnp.sqrt(variance) * jax.nn.one_hot(0, n)
    x = jax.lax.fori_loop(0, n - 2, step, init_state(start, sampler=sampler)).x
    return x[-1], jnp.sum((x - x[-1]) ** 2)


def moments(name, ratio, denoiser, *data, m=0.0, variance=1.0):
    """Mean and variance of x at the end, exactly; it starts with mean alpha m and `variance`.

    With a linear denoiser a sampler is affine in its start and its noises. Image 0 starts one
    standard deviation off and is given no noise, image i + 1 starts at the mean and is given 1 at
    step i, the last one nothing: the variance is the sum of their squared distances from the last.
    """
    grid = ratio_grid(ratio, jnp.float64)
    return tuple(map(float, squares(name, denoiser, data, grid, m, variance)))


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, keys):
    steps = [20, 40, 80, 160, 320]
    errors = [gaussian_flow(name, karras(20.0, 0.02, n + 1), keys, steps[-1]) for n in steps]
    check_order(name, order(steps, errors), 0.15)


@pytest.mark.parametrize("name", ORDERS)
def test_guidance_in_an_interval_costs_no_order(name, keys):
    """A sampler that looks back would fall to order 1, did it look beyond the end of one."""
    a, b, w, edge = 0.25, 1.0, 3.0, 1.0
    rule = parse(f"cfg+interval:lo={edge}")  # a step that begins at the edge is outside
    start, steps, errors = jnp.array([0.3, -1.1]), [100, 200, 400], {True: [], False: []}
    denoiser = functools.partial(guided_gaussian, rule=rule)

    def width(r, w):
        return (a + r**2) ** (w / 2) * (b + r**2) ** ((1 - w) / 2)

    for n in steps:
        inside, outside = karras(20.0, edge, n // 2 + 1), karras(edge, 0.02, n // 2 + 1)
        ratio = np.append(inside, outside[1:])
        alpha, grid = alpha_sigma_from_edm(ratio)[0], ratio_grid(ratio, jnp.float64, steps[-1])
        exact = start / alpha[0] * (width(edge, w) / width(20.0, w))
        exact *= width(0.02, 1) / width(edge, 1)
        for told in (True, False):
            phase = rule.phase if told else None
            x = end(name, denoiser, (a, b, w), start, grid, keys, phase)
            errors[told].append(float(np.max(np.abs(x / alpha[-1] - exact))))
    assert order(steps, errors[True]) > ORDERS[name] - 0.15
    remembers = bool(jax.tree.leaves(SAMPLERS[name].init(start)))
    if not (remembers and order(steps, errors[False]) < 1.15):
        assert errors[True] == errors[False]


@pytest.mark.parametrize("name", ORDERS)
def test_inpainting_costs_no_order(name, keys):
    """A generated latent u = x / alpha whose image is half of the known one beside it, k + r z.

    Then u / r = u0 / r0 + k (1 / r - 1 / r0) / 2 - z log(r / r0) / 2; the denoiser's own idea of
    the known latent is another.
    """
    k, z, u0 = 0.8, -0.5, 0.4
    mask = InpaintingMask(*(jnp.full((1, 1, 2, 1), v) for v in (k, z)), jnp.zeros((1, 1, 2, 1)))
    mask = mask._replace(mask=mask.mask.at[0, 0, 0].set(1))

    def denoise(x, level, memory):
        D = jnp.zeros_like(x).at[:, :, 0].set(x[:, :, 1] / level.alpha[:, :, 0] / 2)
        return Prediction(D, (x - level.alpha * D) / level.sigma), memory

    sampler = SAMPLERS[name].for_schedule(RATIO_SCHEDULE)

    @jax.jit
    def end(grid, steps):
        x = jnp.array([u0, k + grid.t[0, 0] * z]).reshape(1, 1, 2, 1) * grid.alpha[0, 0]
        state = init_state(x, sampler=sampler)
        ends = jnp.int32(0), steps
        state = run_steps(
            denoise, state, grid, keys[:1], *ends, sampler=sampler, inpainting_mask=mask
        )
        return state.x[0, 0, 0, 0] / grid.alpha[0, steps]

    errors, steps = [], (40, 80, 160)
    for n in steps:
        ratio = karras(3.0, 0.3, n + 1)
        # As if a step to a clean image followed: the last one would put it in without noise.
        grid = ratio_grid(np.append(ratio, 0), jnp.float64, length=max(steps) + 1)
        exact = u0 / 3 + k * (1 / 0.3 - 1 / 3) / 2 - z * np.log(0.3 / 3) / 2
        errors.append(abs(float(end(grid, jnp.int32(n))) - 0.3 * exact))
    assert order(steps, errors) > ORDERS[name] - 0.3, errors


@pytest.mark.parametrize("name", WEAK_ORDERS | DRAWING)
def test_weak_order_of_convergence(name):
    """From the exact marginal at the first ratio: the mean is exact, the variance of some order."""
    steps, errors = [160, 320, 640], []
    for n in steps:
        ratio = karras(20.0, 0.02, n + 1)
        alpha, sigma = alpha_sigma_from_edm(ratio)
        spread = alpha**2 * C + sigma**2
        mean, variance = moments(name, ratio, plain_gaussian, m=M, variance=spread[0])
        assert mean == pytest.approx(alpha[-1] * M, abs=1e-13)
        errors.append(abs(variance - spread[-1]))
    assert order(steps, errors) == pytest.approx((WEAK_ORDERS | DRAWING)[name], abs=0.15)


FLOW, EDM = FlowSchedule(shift=2.0), EDMSchedule(sigma_data=0.5)
# Levels of a flow and of EDM, told the number of steps: the ends of Gaussian noise and of the data.
CONTINUOUS = {
    "flow": (FLOW, lambda n: 1000 * FLOW.shifted(np.linspace(0.6, 0.1, n + 1))),
    "edm": (EDM, lambda n: EDM.time_of(karras(20.0, 0.02, n + 1))),
}


def exact_denoiser(x, level, state):
    """Of data N(M, C), on any path x = alpha x0 + sigma eps."""
    alpha, sigma = level.alpha, level.sigma
    D = M + alpha * C / (alpha**2 * C + sigma**2) * (x - alpha * M)
    return Prediction(D, (x - alpha * D) / sigma), state


@pytest.mark.parametrize("path", CONTINUOUS)
@pytest.mark.parametrize("name", ORDERS)
def test_order_on_the_grids_of_continuous_schedules(path, name, keys):
    schedule, times = CONTINUOUS[path]
    sampler = SAMPLERS[name].for_schedule(schedule)
    program = jax.jit(functools.partial(sample, exact_denoiser, sampler=sampler))
    steps, errors, start = [40, 80, 160, 320], [], jnp.array([0.3, -1.1])
    for n in steps:
        t = times(n)
        alpha, sigma = schedule.alpha_sigma(t)
        grid = TimestepGrid.from_host(
            HostTimestepGrid(t, alpha, sigma, 1.0), length=steps[-1], dtype=jnp.float64
        )
        x = program(start, grid, keys) / alpha[-1]
        first, last = sigma[[0, -1]] / alpha[[0, -1]]
        exact = M + (start / alpha[0] - M) * np.sqrt((C + last**2) / (C + first**2))
        errors.append(float(np.max(np.abs(x - exact))))
    check_order(name, order(steps, errors), 0.2)


def test_pndm_is_of_order_3_or_4_where_steps_are_equal(keys):
    """Its weights are of order 4 there; what limits it are the first two steps of PLMS."""
    steps = [40, 80, 160, 320]
    ratios = [np.linspace(0.5, 0.05, n + 1) for n in steps]
    for name, expected in (("pndm", 3), ("pndm:skip_prk_steps=false", 4)):
        errors = [gaussian_flow(name, ratio, keys, steps[-1]) for ratio in ratios]
        assert order(steps, errors) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("ratio", [[2000, 0], [2000, 3.0, 0.5, 0], [2000, 9, 2.0, 1.0, 0.2, 0]])
def test_lcm_with_an_exact_consistency_function_draws_from_the_data(ratio):
    """At any number of steps: each begins from a sample of the marginal and ends in the data."""

    def denoiser(n):
        def network(weights, x, t, conditioning):
            alpha, _ = levels(t)
            end = M + (x / alpha - M) * jnp.sqrt(C / (C + t**2))
            scale = (10 * t) ** 2 + 0.25
            return (end - 0.25 / scale * x) * jnp.sqrt(scale) / (10 * t)

        return unguided(network, None, "sample")

    alpha, sigma = alpha_sigma_from_edm(np.array(ratio, float))
    start = alpha[0] ** 2 * C + sigma[0] ** 2
    mean, variance = moments("lcm", ratio, denoiser, m=M, variance=start)
    assert (mean, variance) == (pytest.approx(M, rel=1e-6), pytest.approx(C, rel=1e-6))


# a, b, w and the variances of the guided ODE and SDE for an infinite start
VARIANCES = [
    (1.0, 2.0, 2.0, 0.5, 0.5833),
    (1.0, 2.0, 3.0, 0.25, 0.3875),
    (1.0, 2.0, 1.5, 0.7071, 0.75),
    (0.5, 3.0, 2.0, 0.083333, 0.199074),
]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("a", "b", "w", "ode", "sde"), VARIANCES)
def test_variance_of_a_guided_gaussian(name, a, b, w, ode, sde):
    coarse, fine = (
        moments(name, np.append(karras(500.0, 0.002, n), 0), guided_gaussian, a, b, w)[1]
        for n in ((500, 1000) if SOLVERS[name] == 1 else (250, 500))
    )
    # Extrapolated to infinitely many steps by the order of the sampler.
    gain = 2.0 ** SOLVERS[name]
    variance = (gain * fine - coarse) / (gain - 1)
    if name == "flow-sde":  # of less noise than the reversed process: see test_flow.py
        assert 1.01 * ode < variance < 0.99 * sde
    else:
        assert variance == pytest.approx(ode if name in ORDERS else sde, rel=1e-3)


@pytest.mark.parametrize("name", [name for name, order in ORDERS.items() if order > 1])
@pytest.mark.parametrize(("a", "b", "w"), [row[:3] for row in VARIANCES])
def test_variance_of_the_guided_ode_over_a_finite_range(name, a, b, w, keys):
    high, low = 40.0, 0.05
    grid = ratio_grid(karras(high, low, 801), jnp.float64)
    x = end(name, guided_gaussian, (a, b, w), jnp.ones(2), grid, keys)
    gain = (x / grid.alpha[0, -1]) ** 2 * grid.alpha[0, 0] ** 2
    exact = ((a + low**2) / (a + high**2)) ** w * ((b + low**2) / (b + high**2)) ** (1 - w)
    np.testing.assert_allclose(gain, exact, rtol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_guidance_moves_the_mean_of_equal_gaussians_to_w(name, keys):
    """N(m_c, v) guided against N(m_u, v) ends at w m_c + (1 - w) m_u, by the ODE and the SDE."""
    w, mc, mu, v = 3.0, 1.0, 0.4, 0.3
    denoise = guided_gaussian(2, v, v, w, kind="epsilon", means=(mc, mu))
    # Without noise and from 0 every step is that of the mean.
    sampler = SAMPLERS[name].for_schedule(RATIO_SCHEDULE)
    grid = ratio_grid(np.append(karras(500.0, 0.01, 400), 0), jnp.float64).for_images(2)

    def step(i, carry):
        ends = (grid.level(jnp.full(2, j), 1) for j in (i, i + 1))
        return sampler.step(denoise, carry, *ends, lambda: jnp.zeros(2))

    carry = jax.lax.fori_loop(0, grid.num_steps[0], step, init_state(jnp.zeros(2), sampler=sampler))
    np.testing.assert_allclose(carry.x, w * mc + (1 - w) * mu, rtol=2e-2)
