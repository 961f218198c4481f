"""Noise schedules against their closed forms and published numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.checkpoints.schedulers import vp_schedule, vp_schedule_config
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion import schedules
from jaxdiff.diffusion.denoising import alpha_sigma_from_edm, predict
from jaxdiff.diffusion.schedules import (
    SCHEDULES,
    EDMSchedule,
    FlowSchedule,
    VPSchedule,
    resolution_shift,
)

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

# abar_0, abar_{T-1}, smallest and largest sigma / alpha
TABLE = [
    ({"beta_schedule": "linear"}, 0.9999, 4.036e-5, 0.0100, 157.41),
    (STABLE_DIFFUSION, 0.99915, 4.6601e-3, 0.029167, 14.6146),
    ({"beta_schedule": "squaredcos_cap_v2"}, 0.9999587, 2.43e-9, 0.00643, 2.03e4),
]


@pytest.mark.parametrize(("config", "first", "last", "low", "high"), TABLE)
def test_published_end_points(config, first, last, low, high):
    schedule = VPSchedule(**config)
    assert schedule.alphas_cumprod[0] == pytest.approx(first, abs=1e-7)
    assert schedule.alphas_cumprod[-1] == pytest.approx(last, rel=2e-3)
    assert schedule.sigma_edm[0] == pytest.approx(low, rel=8e-4)
    assert schedule.sigma_edm[-1] == pytest.approx(high, rel=2e-3)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_keeps_the_contract(name, zero_terminal_snr):
    schedule = VPSchedule(beta_schedule=name, zero_terminal_snr=zero_terminal_snr)
    assert schedule.num_discrete == 1000
    for table in (schedule.alphas_cumprod, schedule.alpha, schedule.sigma):
        assert table.shape == (1000,)
        assert table.dtype == np.float64
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-15)
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    assert np.all(np.diff(schedule.sigma_edm) > 0)
    assert 0.999 < schedule.alphas_cumprod[0] < 1
    assert (schedule.alphas_cumprod[-1] == 0) == zero_terminal_snr
    again = vp_schedule(vp_schedule_config(schedule))
    np.testing.assert_array_equal(again.alphas_cumprod, schedule.alphas_cumprod)


def test_cosine_follows_its_definition_until_the_cap():
    abar = VPSchedule(beta_schedule="cosine").alphas_cumprod
    u = np.arange(1, 1001) / 1000
    exact = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(abar[:-1], exact[:-1], rtol=1e-10)
    assert abar[-1] == pytest.approx(abar[-2] * 0.001, rel=1e-12)


def test_zero_terminal_snr_of_stable_diffusion():
    plain = VPSchedule(**STABLE_DIFFUSION)
    zero = VPSchedule(**STABLE_DIFFUSION, zero_terminal_snr=True)
    assert zero.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-14)
    assert zero.alphas_cumprod[998] == pytest.approx(1.97e-7, rel=3e-3)
    assert zero.alphas_cumprod[999] == 0
    assert np.isinf(zero.sigma_edm[999])


def test_levels_of_the_extremes():
    alpha, sigma = alpha_sigma_from_edm(np.array([0.0, 1.0, np.inf]))
    np.testing.assert_allclose(alpha, [1, 0.5**0.5, 0], rtol=1e-15)
    np.testing.assert_allclose(sigma, [0, 0.5**0.5, 1], rtol=1e-15)


def test_gather_reads_the_tables_in_float32():
    schedule = VPSchedule(**STABLE_DIFFUSION)
    alpha, sigma = schedule.alpha_sigma(jnp.array([0, 999]))
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_array_equal(alpha, schedule.alpha[[0, 999]].astype(np.float32))
    np.testing.assert_array_equal(sigma, schedule.sigma[[0, 999]].astype(np.float32))


def test_from_config_passes_over_foreign_keys_and_keeps_trained_betas():
    config = {"_class_name": "PNDMScheduler", "clip_sample": False, "trained_betas": [0.1, 0.2]}
    schedule = vp_schedule(config)
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.72])
    assert schedule.num_discrete == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_schedule": "sigmoid"},
        {"num_train_timesteps": 0},
        {"beta_end": 1.5},
        {"trained_betas": (0.1, -0.1)},
    ],
)
def test_bad_values_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        VPSchedule(**wrong)


def test_a_discrete_schedule_rounds_times_and_finds_the_time_of_a_ratio():
    schedule = VPSchedule(**STABLE_DIFFUSION)
    alpha, sigma = schedule.alpha_sigma(np.array([0.0, 41.4, 998.6]))
    np.testing.assert_array_equal(alpha, schedule.alpha[[0, 41, 999]])
    np.testing.assert_array_equal(sigma, schedule.sigma[[0, 41, 999]])
    np.testing.assert_allclose(schedule.time_of(schedule.sigma_edm), np.arange(1000), atol=1e-9)
    between = np.sqrt(schedule.sigma_edm[[41]] * schedule.sigma_edm[[42]])
    np.testing.assert_allclose(schedule.time_of(between), [41.5], rtol=1e-12)
    zero = VPSchedule(**STABLE_DIFFUSION, zero_terminal_snr=True)
    np.testing.assert_array_equal(zero.time_of(np.array([0.0, np.inf])), [0, 999])


FLOW, EDM = FlowSchedule(shift=3.0), EDMSchedule(sigma_data=0.5)
COSINE = FlowSchedule(path="cosine")


def test_a_flow_is_a_straight_line_in_its_time():
    alpha, sigma = FLOW.alpha_sigma(np.array([0.0, 250.0, 1000.0]))
    np.testing.assert_array_equal(alpha, [1, 0.75, 0])
    np.testing.assert_array_equal(sigma, [0, 0.25, 1])
    # 3 s / (1 + 2 s)
    np.testing.assert_allclose(FLOW.shifted(np.array([0, 0.25, 0.5, 1])), [0, 0.5, 0.75, 1])


def test_a_flow_shifts_with_the_resolution():
    assert resolution_shift(256) == pytest.approx(math.exp(0.5), rel=1e-14)
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15), rel=1e-14)
    assert resolution_shift(2176) == pytest.approx(math.exp(0.825), rel=1e-14)


def test_edm_tells_the_network_its_preconditioning():
    """Table 1 of the paper: c_in, c_noise, and D = c_skip y + c_out F where F is minus v."""
    noise, y, F = np.array([0.002, 0.5, 3.0, 80.0]), 0.3, -0.8
    t = EDM.time_of(noise / 0.5)
    np.testing.assert_allclose(t, np.log(noise) / 4, rtol=1e-12)
    alpha, sigma = EDM.alpha_sigma(t)
    c_in = 1 / np.sqrt(noise**2 + 0.25)
    np.testing.assert_allclose(alpha / 0.5, c_in, rtol=1e-12)
    c_skip, c_out = 0.25 / (noise**2 + 0.25), noise * 0.5 / np.sqrt(noise**2 + 0.25)
    x0 = predict("v_prediction", *map(jnp.asarray, (np.full(4, -F), c_in * y, alpha, sigma))).x0
    np.testing.assert_allclose(0.5 * x0, c_skip * y + c_out * F, rtol=1e-4)


@pytest.mark.parametrize("schedule", [FLOW, COSINE, EDM])
def test_continuous_times_are_found_again_on_the_host_and_in_programs(schedule):
    ratio = np.geomspace(1e-3, 1e3, 31)
    alpha, sigma = schedule.alpha_sigma(schedule.time_of(ratio))
    np.testing.assert_allclose(sigma / alpha, ratio, rtol=1e-12)
    assert schedule.num_discrete is None
    traced = jax.jit(lambda r: schedule.alpha_sigma(schedule.time_of(r)))(jnp.asarray(ratio))
    for mine, exact in zip(traced, (alpha, sigma), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-4)
    high, low = schedule.alpha_sigma(schedule.time_of(np.array([np.inf])))
    np.testing.assert_array_equal([high, low], [[0], [1]])


@pytest.mark.parametrize("schedule", [FLOW, COSINE, EDM])
def test_derivatives_are_those_of_the_path(schedule):
    """Against central differences, whose error is of second order."""
    t = schedule.time_of(np.geomspace(1e-2, 1e2, 31))
    h = 1e-5 * (np.max(t) - np.min(t))
    later, earlier = (np.stack(schedule.alpha_sigma(t + step)) for step in (h, -h))
    got = np.stack(schedule.derivatives(t))
    scale = np.max(np.abs(got))
    np.testing.assert_allclose(got, (later - earlier) / (2 * h), atol=1e-8 * scale)
    traced = jax.jit(schedule.derivatives)(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(traced, got, atol=1e-4 * scale)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_derivatives_of_discrete_levels(zero_terminal_snr):
    """d log alpha / dt = -beta / 2 of the continuous process (2011.13456, eq. 11)."""
    schedule = VPSchedule(zero_terminal_snr=zero_terminal_snr)
    t = np.arange(1, 999)
    d_alpha, d_sigma = schedule.derivatives(t)
    alpha, sigma = schedule.alpha_sigma(t)
    np.testing.assert_allclose(alpha * d_alpha + sigma * d_sigma, 0, atol=1e-15)
    beta = 1 - schedule.alphas_cumprod[1:] / schedule.alphas_cumprod[:-1]
    inside = slice(20, 900)
    middle = (beta[:-1] + beta[1:]) / 2  # at level t, between the steps to it and from it
    np.testing.assert_allclose((d_alpha / alpha)[inside], -middle[inside] / 2, rtol=2e-2)
    assert np.all(np.isfinite(schedule.derivatives(np.array([0, 999]))))
    traced, _ = jax.jit(schedule.derivatives)(jnp.arange(1, 999))
    np.testing.assert_allclose(traced, d_alpha, rtol=1e-5)


def test_a_cosine_flow_is_a_circle():
    alpha, sigma = COSINE.alpha_sigma(np.array([0.0, 500.0, 1000.0]))
    np.testing.assert_allclose(alpha, [1, 0.5**0.5, 0], rtol=1e-15, atol=0)
    np.testing.assert_allclose(sigma, [0, 0.5**0.5, 1], rtol=1e-15, atol=0)
    assert COSINE.time_of(np.array([1.0])) == pytest.approx(500)
    with pytest.raises(InputError, match="path: got 'straight', expected one of linear, cosine"):
        FlowSchedule(path="straight")


@pytest.mark.parametrize("schedule", [FLOW, COSINE, EDM, VPSchedule(**STABLE_DIFFUSION)])
def test_levels_of_a_ratio_lie_on_the_path(schedule):
    ratio = np.geomspace(0.05, 14, 31)
    t, alpha, sigma = schedule.level_of(ratio)
    np.testing.assert_array_equal(t, schedule.time_of(ratio))
    np.testing.assert_allclose(sigma / alpha, ratio, rtol=1e-12)
    power = 1 if schedule is FLOW else 2
    np.testing.assert_allclose(alpha**power + sigma**power, 1, rtol=1e-12)
    traced = jax.jit(schedule.level_of)(jnp.asarray(ratio))
    for mine, exact in zip(traced, (t, alpha, sigma), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-4)


def test_a_discrete_schedule_ends_at_its_highest_level():
    schedule = VPSchedule(**STABLE_DIFFUSION)
    t, alpha, sigma = schedule.level_of(np.array([1e9]))
    assert t == schedule.num_discrete - 1
    np.testing.assert_allclose([alpha[0], sigma[0]], [schedule.alpha[-1], schedule.sigma[-1]])


def test_former_names_of_the_library_still_work():
    from jaxdiff import samplers
    from jaxdiff.checkpoints import timestep_grids

    assert schedules.NoiseSchedule is VPSchedule
    assert samplers.make_grid is timestep_grids.make_grid
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = samplers.nothing_here
