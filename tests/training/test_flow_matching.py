"""Flow and score matching: densities of the times, and losses of exact denoisers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import posterior_mean
from scipy.special import logit, ndtr
from tiny_training import OBJECTIVE

from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.denoising import target
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule, resolution_shift
from jaxdiff.training.config import TimestepSampling
from jaxdiff.training.objectives.diffusion import (
    denoising_losses,
    num_patches,
    sample_times,
)

FLOW = dataclasses.replace(OBJECTIVE, schedule=FlowSchedule(), prediction_type="flow_prediction")
NUM_TIMES = 40_000


def sampled(schedule, num_tokens=None, **fields):
    """Sampled times as fractions of the way to noise, in order."""
    sampling = TimestepSampling(**fields)
    t = sample_times(jax.random.key(0), (NUM_TIMES,), schedule, sampling, num_tokens)
    return np.sort(np.asarray(t, np.float64)) / 1000


def check_distribution(s, cdf):
    """Kolmogorov's distance to a distribution is below that of 1 sample in 1000."""
    assert s[0] >= 0
    assert s[-1] <= 1
    empirical = (np.arange(NUM_TIMES) + 0.5) / NUM_TIMES
    assert np.max(np.abs(empirical - cdf(s))) < 1.95 / math.sqrt(NUM_TIMES)


def unshifted(s, shift):
    return s / (shift - (shift - 1) * s)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6), (1.0, 1.5)])
def test_logit_normal_times(mean, std, shift):
    names = {"logit_mean": mean, "logit_std": std, "timestep_sampling": "logit_normal"}
    s = sampled(FlowSchedule(), timestep_shift=shift, **names)
    check_distribution(s, lambda s: ndtr((logit(unshifted(s, shift)) - mean) / std))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.29, 2 / (math.pi - 2)])
def test_mode_times(scale):
    """The time f(u) of a uniform u falls with u: no more than f(u) are 1 - u of them."""
    u = np.linspace(0, 1, 20_001)
    f = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    assert np.all(np.diff(f) <= 1e-12)
    s = sampled(FlowSchedule(), timestep_sampling="mode", mode_scale=scale)
    check_distribution(s, lambda s: np.interp(s, f[::-1], 1 - u[::-1]))
    # more of the middle for positive scales, of the ends for negative ones; half on either side
    middle = np.mean((s > 0.4) & (s < 0.6))
    assert np.sign(round(middle - 0.2, 2)) == np.sign(scale)
    assert np.mean(s < 0.5) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("schedule", "own", "tokens", "shift"),
    [
        (1.0, 1.0, None, 1.0),
        (3.0, 1.0, None, 3.0),
        (3.0, 2.0, None, 6.0),
        (3.0, 1.0, 4096, math.exp(1.15)),
        (3.0, 2.0, 256, 2 * math.exp(0.5)),
    ],
)
def test_shifts_multiply_and_that_by_resolution_replaces_the_schedules(
    schedule, own, tokens, shift
):
    s = sampled(FlowSchedule(shift=schedule), tokens, timestep_shift=own)
    check_distribution(s, lambda s: unshifted(s, shift))


def test_patches_are_the_tokens_of_flux():
    """An image of 1024 pixels has latents of 128, and 4096 tokens."""
    assert num_patches(jnp.zeros((1, 128, 128, 16))) == 4096
    assert resolution_shift(num_patches(jnp.zeros((1, 32, 32, 16)))) == math.exp(0.5)


MEANS, VARIANCES, WEIGHTS = np.array([-2.0, 2.0]), np.array([0.25, 0.04]), np.array([0.3, 0.7])


def conditional_variance(alpha, sigma):
    """E Var(x0 | x) of the mixture for x = alpha x0 + sigma eps, integrated over x."""
    x = np.linspace(-12, 12, 48_001)
    spread = alpha**2 * VARIANCES + sigma**2
    off = x[:, None] - alpha * MEANS
    joint = WEIGHTS * np.exp(-(off**2) / (2 * spread)) / np.sqrt(2 * np.pi * spread)
    p = joint.sum(1)
    share = joint / np.maximum(p, 1e-300)[:, None]
    means, variances = MEANS + alpha * VARIANCES / spread * off, VARIANCES * sigma**2 / spread
    mean = (share * means).sum(1)
    variance = (share * (variances + means**2)).sum(1) - mean**2
    return float(np.sum(p * variance) * (x[1] - x[0]))


# What the error of D is multiplied with to be that of the loss.
FACTORS = {
    "flow_prediction": lambda a, s: ((a + s) / s) ** 2,
    "sample": lambda a, s: 1.0,
    "epsilon": lambda a, s: (a / s) ** 2,
    "score": lambda a, s: (a / s) ** 2,  # of the weight sigma^2
    "v_prediction": lambda a, s: 1 / s**2,
}
CASES = [("flow_prediction", FlowSchedule()), ("sample", FlowSchedule())] + [
    (kind, VPSchedule()) for kind in FACTORS
]


@pytest.mark.parametrize(("kind", "schedule"), CASES)
@pytest.mark.parametrize("time", [100, 400, 700])
def test_the_loss_of_an_exact_denoiser_is_its_conditional_variance(kind, schedule, time):
    config = dataclasses.replace(OBJECTIVE, schedule=schedule, prediction_type=kind)
    n, rng = 40_000, np.random.default_rng(1)
    modes = rng.choice(2, n, p=WEIGHTS)
    x0 = MEANS[modes] + np.sqrt(VARIANCES[modes]) * rng.normal(size=n)
    x0, eps = (jnp.asarray(a, jnp.float32)[:, None, None, None] for a in (x0, rng.normal(size=n)))
    t = jnp.full(n, float(time))
    alpha, sigma = (float(level[0]) for level in schedule.alpha_sigma(t))
    mix = jnp.tile(jnp.asarray(WEIGHTS, jnp.float32), (n, 1))

    def exact(x, t):
        a, s = jnp.full_like(x, alpha), jnp.full_like(x, sigma)
        D = posterior_mean(x, a, s, MEANS, VARIANCES, mix)
        return target(kind, D, (x - alpha * D) / sigma, jnp.float32(alpha), jnp.float32(sigma))

    errors = np.asarray(denoising_losses(config, exact, x0, t, eps).error, np.float64)
    expected = FACTORS[kind](alpha, sigma) * conditional_variance(alpha, sigma)
    assert abs(errors.mean() - expected) < 4 * errors.std() / math.sqrt(n)
    assert errors.std() / math.sqrt(n) < 0.05 * expected


def test_a_flow_on_a_path_that_no_pipeline_folder_can_describe_is_refused():
    with pytest.raises(InputError, match=r"objective\.schedule\.path: got cosine, expected linear"):
        dataclasses.replace(FLOW, schedule=FlowSchedule(path="cosine"))
    assert dataclasses.replace(FLOW, timestep_shift_by_resolution=True).schedule == FLOW.schedule


@pytest.mark.parametrize(
    ("field", "value", "sampling"),
    [
        ("logit_std", 0.0, "logit_normal"),
        ("logit_mean", 11.0, "logit_normal"),
        ("mode_scale", 1.8, "mode"),
        ("mode_scale", -1.1, "mode"),
    ],
)
def test_parameters_of_times_have_limits(field, value, sampling):
    with pytest.raises(InputError, match=rf"objective\.{field}: got {value}"):
        dataclasses.replace(FLOW, timestep_sampling=sampling, **{field: value})
