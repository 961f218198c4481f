"""Samplers and grids against the schedulers of diffusers, on the configs of real checkpoints.

The network is a fixed formula of (x, t), so that only schedules, grids and step rules are compared.
"""

import dataclasses
import functools
import inspect
import itertools
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdiff.checkpoints.schedulers import (
    SchedulerOptions,
    prediction_type_of,
    sampler_name,
    schedule_of,
    vp_schedule,
)
from jaxdiff.checkpoints.timestep_grids import make_grid, make_host_grid
from jaxdiff.diffusion.schedules import EDMSchedule
from jaxdiff.guidance.base import RULES, GuidanceScales
from jaxdiff.guidance.denoiser import guided_denoiser
from jaxdiff.samplers.base import get_sampler, per_sample_keys, step_noise
from jaxdiff.samplers.sampling import initial_noise, sample

# torch 2.13 inside diffusers, about numpy's keywords
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__ must accept:DeprecationWarning",
)

SHAPE = (4, 4, 2)
SEEDS = (0, 1, 2)
UNGUIDED = GuidanceScales(jnp.ones(len(SEEDS)))

STABLE_DIFFUSION = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
# scheduler_config.json of the repositories, and one of a zero-terminal-SNR fine-tune.
CONFIGS = {
    "sd15": {"_class_name": "PNDMScheduler", **STABLE_DIFFUSION},
    "sd21": {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        **STABLE_DIFFUSION,
    },
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
        **STABLE_DIFFUSION,
    },
    "zero-snr": {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        **STABLE_DIFFUSION,
    },
}
CLASSES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp-2s": diffusers.DPMSolverSinglestepScheduler,
    "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp-2m-sde": diffusers.DPMSolverMultistepScheduler,
    "dpmpp-3m-sde": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "kdpm2-ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}
# What those classes are told besides the config of the checkpoint.
CHOICES = {
    "dpmpp-2s": {"lower_order_final": True},
    "dpmpp-2m-sde": {"algorithm_type": "sde-dpmsolver++"},
    # The second step is of second order in this form, and so is none of the last.
    "dpmpp-3m-sde": {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "heun",
        "lower_order_final": False,
    },
}
NOT_IN_RATIOS = ("ddpm", "ddim", "pndm", "lcm", "tcd")
# They carry x / alpha, up to 4096, and divide what that is rounded by by r'.
CARRY_RATIOS = ("heun", "lms", "kdpm2", "kdpm2-ancestral")
# They round or cut the times of a curve to whole ones.
SOLVERS = ("dpmpp-2s", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m-sde", "unipc", "deis")
SPACINGS = (None, "leading", "linspace", "trailing")
CURVES = ("karras", "exponential", "beta")


def formula(xp, kind, x, t, pattern):
    """What the network predicts; `xp` is jax.numpy or torch.

    It means an image in [-1, 1] and noise that fit together on a cosine path, which is near enough
    to the schedules that latents stay of order 1, as those of a trained network do.
    """
    angle = (t + 20) / 1020 * np.pi / 2
    a, s = xp.cos(angle), xp.sin(angle)
    D = xp.tanh(1.3 * x + pattern)
    eps = (x - a * D) / s
    return eps if kind == "epsilon" else a * eps - s * D


def pattern():
    return np.sin(np.arange(np.prod(SHAPE)).reshape(1, *SHAPE)).astype(np.float32)


def network(kind):
    """The formula as a network of jaxdiff."""

    def call(weights, x, t, conditioning):
        per_image = t.reshape(-1, 1, 1, 1)
        return formula(jnp, kind, x, per_image, jnp.broadcast_to(pattern(), x.shape))

    return call


@functools.cache
def sampling(sampler, kind):
    """The compiled loop of a sampler; another grid compiles nothing."""
    denoise = guided_denoiser(
        network(kind), (), None, UNGUIDED, rule=RULES["none"], prediction_type=kind
    )
    return jax.jit(functools.partial(sample, denoise, sampler=sampler))


class Stride:
    """Stands for the number of steps in DDIM and PNDM, which go from t to t - T // steps.

    Their own grids go elsewhere when they are not `leading`, and they then call the network for a
    level that x is not at. A stride makes them follow their grid, as every other scheduler does.
    """

    def __init__(self, stride):
        self.stride = stride

    def __rfloordiv__(self, _):
        return self.stride


def follow_the_grid(scheduler, i):
    """Let DDIM or PNDM go to the next time of their grid in the step of evaluation i."""
    if scheduler.config.timestep_spacing != "leading":
        # PNDM names its second time twice: its first step is made twice.
        times = sorted({*scheduler.timesteps.tolist(), -1}, reverse=True)
        step = max(i - 1, 0) if len(scheduler.timesteps) == len(times) else i
        scheduler.num_inference_steps = Stride(times[step] - times[step + 1])


def scheduler_for(config, name, steps, exact=True):
    """A diffusers scheduler on the grid of `steps`, a number or timesteps.

    With our float64 table of abar unless `exact` is False.
    """
    scheduler = CLASSES[name].from_config(config, **CHOICES.get(name, {}))
    if name == "pndm":
        scheduler.register_to_config(prediction_type="epsilon")  # see noise_of
    if exact:
        table = vp_schedule(config).alphas_cumprod.copy()
        if name not in NOT_IN_RATIOS:
            table[-1] = max(table[-1], 2.0**-24)  # as they do themselves
        scheduler.alphas_cumprod = torch.from_numpy(table)
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    chosen = {"timesteps": list(steps)} if isinstance(steps, tuple) else {}
    scheduler.set_timesteps(None if chosen else steps, **chosen)
    if name not in NOT_IN_RATIOS:
        scheduler.set_begin_index(0)  # where two times round to one it would start from the second
    if name in SOLVERS and config.get("use_exponential_sigmas"):
        scheduler.timesteps[0] = 999  # it cuts 998.999..., by the last bit of a logarithm
    if name == "kdpm2-ancestral":
        exact_way_down(scheduler)
    return scheduler


def exact_way_down(scheduler):
    """Let KDPM2 ancestral compute its levels in float64, as sqrt(r'^2 - up^2) cancels in float32.

    Where r' is far below r nothing is left of it: see scheduler_errors.py.
    """
    r = scheduler.sigmas[::2].double()  # all but the first and the last are there twice
    r_next = torch.cat([r[1:], r[-1:]])
    down = torch.nan_to_num(r_next**2 / r)
    up, middle = (r_next**2 - down**2).sqrt(), (r * down).sqrt()
    for name, levels in {"up": up, "down": down, "interpol": middle}.items():
        twice = torch.cat([levels[:1], levels[1:].repeat_interleave(2), levels[-1:]])
        setattr(scheduler, f"sigmas_{name}", twice)
    table = scheduler.log_sigmas.numpy()
    times = [scheduler._sigma_to_t(ratio, table) for ratio in middle[:-2].numpy()]
    scheduler.timesteps[1::2] = torch.from_numpy(np.array(times))


def noise_of(scheduler, v, t, x):
    """The noise that a network means by v.

    PNDMScheduler would average the v of different levels and take their mean for one of the last
    level; that leaves an error of second order in a step, so that the whole is of first order.
    """
    abar = scheduler.alphas_cumprod[t]
    return (abar.sqrt() * v + (1 - abar).sqrt() * x).float()


def theirs(config, name, steps, noises, eta=0.0, exact=True):
    """Latents of a diffusers scheduler, from noises[-1] and with noises[i] at step i."""
    scheduler = scheduler_for(config, name, steps, exact)
    kind = config.get("prediction_type", "epsilon")
    x = torch.from_numpy(noises[-1]) * scheduler.init_noise_sigma
    if name in (*CARRY_RATIOS, "deis"):  # whose coefficients are differences of rho log rho
        x, scheduler.sigmas = x.double(), scheduler.sigmas.double()
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        output = formula(torch, kind, seen, t.float(), torch.from_numpy(pattern()))
        options = {}
        if name in ("ddim", "pndm"):
            follow_the_grid(scheduler, i)
        if name == "ddim" and eta:
            options = {"eta": eta, "variance_noise": torch.from_numpy(noises[i])}
        if name == "pndm" and kind == "v_prediction":
            output = noise_of(scheduler, output, t, x)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x.numpy()


def ours(config, name, steps, keys, spacing=None, eta=0.0):
    """Latents of jaxdiff for the same config."""
    schedule, kind = vp_schedule(config), config.get("prediction_type", "epsilon")
    grid = make_grid(
        schedule,
        name,
        steps,
        prediction_type=kind,
        spacing=spacing,
        options=SchedulerOptions.from_config(config),
    )
    rule = get_sampler(name).for_schedule(schedule)
    rule = dataclasses.replace(rule, eta=eta) if name == "ddim" else rule
    return np.asarray(sampling(rule, kind)(initial_noise(keys, SHAPE), grid, keys))


@pytest.fixture(scope="module")
def keys():
    return per_sample_keys(SEEDS)


@pytest.fixture(scope="module")
def noises(keys):
    """The noise of steps 0 .. 49 and, last, the noise to start from."""
    steps = [step_noise(keys, i, SHAPE, jnp.dtype("float32")) for i in range(50)]
    return [np.array(z) for z in (*steps, initial_noise(keys, SHAPE))]


def with_spacing(config, spacing):
    if spacing is None:
        return config
    if spacing in CURVES:
        return {**config, f"use_{spacing}_sigmas": True}
    return {**config, "timestep_spacing": spacing}


def close(mine, reference, tolerance):
    error = np.max(np.abs(mine - reference)) / np.max(np.abs(reference))
    assert error < tolerance, error


# On the same table both round in float32: 6e-8 at each operation, which the first step multiplies
# by sigma / alpha = 15. The largest measured is 1e-5, the median 5e-7.
TOLERANCE = 2e-5
# Adams-Bashforth of order 4 weighs noises by (55, -59, 37, -9) / 24, whose sizes add up to this.
LMS_TOLERANCE = 160 / 24 * TOLERANCE
# Euler in diffusers carries x / alpha, which starts at 4096 where the SNR is zero; a polynomial
# through noises at ratios from there to 1 multiplies their rounding by up to 500.
# KDPM2 ancestral multiplies that of images by r / r'.
EULER_FROM_ZERO_SNR = 1e-3
FROM_INFINITY = ("euler", "euler-ancestral", "lms", "deis", "kdpm2-ancestral")
# The float32 product of diffusers is off by up to 3e-5 in 1 - abar.
THEIR_TABLE = 5e-5

CASES = list(itertools.product(CONFIGS, (2, 4, 25, 50), SPACINGS))


def tolerance(name, config):
    if name in FROM_INFINITY and config == "zero-snr":
        return EULER_FROM_ZERO_SNR
    return LMS_TOLERANCE if name == "lms" else TOLERANCE


@pytest.mark.parametrize("steps", [2, 25, 50])
@pytest.mark.parametrize("config", ["sd15", "sd21", "sdxl"])
# Heun in 2 steps would multiply that by r / 2 r' = 250.
@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "dpmpp-2s", "dpmpp-2m", "unipc"])
def test_diffusers_as_it_is(name, config, steps, keys, noises):
    mine = ours(CONFIGS[config], name, steps, keys)
    close(mine, theirs(CONFIGS[config], name, steps, noises, exact=False), THEIR_TABLE)


@pytest.mark.parametrize(("config", "steps", "spacing"), CASES)
@pytest.mark.parametrize(
    "name", ["ddim", "euler", "heun", "lms", "kdpm2", "dpmpp-2m", "unipc", "deis"]
)
def test_deterministic_samplers(name, config, steps, spacing, keys, noises):
    mine = ours(CONFIGS[config], name, steps, keys, spacing)
    reference = theirs(with_spacing(CONFIGS[config], spacing), name, steps, noises)
    close(mine, reference, tolerance(name, config))


@pytest.mark.parametrize(("config", "steps"), list(itertools.product(CONFIGS, (4, 25, 50))))
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(
    "name", ["euler", "heun", "lms", "kdpm2", "dpmpp-2s", "dpmpp-2m", "unipc", "deis"]
)
def test_curves(name, curve, config, steps, keys, noises):
    mine = ours(CONFIGS[config], name, steps, keys, curve)
    reference = theirs(with_spacing(CONFIGS[config], curve), name, steps, noises)
    close(mine, reference, tolerance(name, config))


@pytest.mark.parametrize("spacing", ["leading", "trailing", *CURVES])
@pytest.mark.parametrize("config", ["sd21", "sdxl"])
@pytest.mark.parametrize("name", ["euler", "dpmpp-2m"])
def test_landing_on_the_first_level(name, config, spacing, keys, noises):
    """UniPC in diffusers makes its last step of first order even then, 2S and 2M if there are few.

    That is why checkpoints that ask these for "sigma_min" are refused.
    """
    low = {**CONFIGS[config], "final_sigmas_type": "sigma_min"}
    mine = ours(low, name, 25, keys, spacing)
    if name == "euler":
        mine = mine / vp_schedule(low).alpha[0]  # theirs ends with x / alpha
    close(mine, theirs(with_spacing(low, spacing), name, 25, noises), TOLERANCE)


# From pure noise diffusers divides by 0 in PNDM, and in DDIM with noise it takes the root of a
# negative rounding error: all is NaN.
NOT_FROM_INFINITY = [case for case in CASES if case[0] != "zero-snr" or case[2] == "leading"]


@pytest.mark.parametrize(("config", "steps", "spacing"), NOT_FROM_INFINITY)
def test_pndm(config, steps, spacing, keys, noises):
    mine = ours(CONFIGS[config], "pndm", steps, keys, spacing)
    close(mine, theirs(with_spacing(CONFIGS[config], spacing), "pndm", steps, noises), TOLERANCE)


@pytest.mark.parametrize("steps", [4, 10, 25, 50])  # diffusers needs 4, and strides of even length
@pytest.mark.parametrize("config", ["sd15", "sd21"])
def test_pndm_that_begins_with_runge_kutta(config, steps, keys, noises):
    prk = {**CONFIGS[config], "_class_name": "PNDMScheduler", "skip_prk_steps": False}
    mine = ours(prk, sampler_name(prk), steps, keys)
    close(mine, theirs(prk, "pndm", steps, noises), TOLERANCE)


@pytest.mark.parametrize("sampler", ["heun", "kdpm2", "lcm", "pndm", "ddim", "euler", "dpmpp-2m"])
def test_a_config_that_names_nothing_but_its_class(sampler, keys, noises, monkeypatch):
    if sampler == "lcm":
        draws_from(noises, sampler, monkeypatch)
    config = {"_class_name": CLASSES[sampler].__name__}
    clip = {"clip_sample": False} if sampler == "ddim" else {}
    steps = 10
    reference = theirs(config | clip, sampler, steps, noises, exact=False)
    close(ours(config, sampler_name(config), steps, keys), reference, THEIR_TABLE)


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("name", ["dpmpp-2m", "dpmpp-2s"])
def test_lambda_min_clipped(name, spacing, steps, keys, noises):
    clipped = {
        "_class_name": CLASSES[name].__name__,
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": -5.1,
        "timestep_spacing": spacing,
    }
    mine = ours(clipped, name, steps, keys)
    close(mine, theirs(clipped, name, steps, noises), TOLERANCE)


@pytest.mark.parametrize(("config", "steps", "spacing"), NOT_FROM_INFINITY)
def test_ddim_with_noise(config, steps, spacing, keys, noises):
    mine = ours(CONFIGS[config], "ddim", steps, keys, spacing, eta=1.0)
    reference = theirs(with_spacing(CONFIGS[config], spacing), "ddim", steps, noises, eta=1.0)
    close(mine, reference, TOLERANCE)


def draws_from(noises, name, monkeypatch):
    """Let the scheduler draw `noises` one by one; let that of 3M be right."""
    module = sys.modules[CLASSES[name].__module__]
    drawn = iter(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(drawn)))
    if name == "dpmpp-3m-sde":
        update = "multistep_dpm_solver_third_order_update"
        monkeypatch.setattr(CLASSES[name], update, third_order_update)


def third_order_update(scheduler, images, *, sample, noise):
    """The third-order step of SDE-DPM-Solver++, integrated for the parabola through three images.

    Theirs has another sign in the coefficient of the second differences, (1 - exp(-2h) - 2h) / 4h^2
    - 1/2 for + 1/2: that goes to -1 with h instead of to 0, which makes the whole of first order.
    And those differences are half of h^2 D'', but weighted as if they were all of it.
    """
    sigmas = scheduler.sigmas[scheduler.step_index - 2 : scheduler.step_index + 2].double()
    lam = -sigmas.log()
    h = lam[3] - lam[2]
    alpha = 1 / (1 + sigmas[3] ** 2) ** 0.5
    p = 1 - torch.exp(-2 * h)
    moments = torch.stack([p, h - p / 2, h**2 - h + p / 2])
    powers = (lam[:3] - lam[2])[None] ** torch.arange(3)[:, None]
    weights = torch.linalg.solve(powers, moments)
    integral = sum(w * image for w, image in zip(weights, images, strict=True))
    kept = sigmas[3] * alpha / (sigmas[2] / (1 + sigmas[2] ** 2) ** 0.5) * torch.exp(-h)
    return (kept * sample + alpha * integral + sigmas[3] * alpha * p**0.5 * noise).float()


@pytest.mark.parametrize(("config", "steps", "spacing"), CASES)
@pytest.mark.parametrize(
    "name", ["ddpm", "euler-ancestral", "kdpm2-ancestral", "dpmpp-2m-sde", "dpmpp-3m-sde"]
)
def test_samplers_with_noise(name, config, steps, spacing, keys, noises, monkeypatch):
    draws_from(noises, name, monkeypatch)
    mine = ours(CONFIGS[config], name, steps, keys, spacing)
    reference = theirs(with_spacing(CONFIGS[config], spacing), name, steps, noises)
    close(mine, reference, tolerance(name, config))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize("config", ["sd15", "sd21", "sdxl"])
def test_noise_on_curves(curve, config, steps, keys, noises, monkeypatch):
    """The middle of a step is asked at its own time where that of the level is rounded."""
    draws_from(noises, "kdpm2-ancestral", monkeypatch)
    mine = ours(CONFIGS[config], "kdpm2-ancestral", steps, keys, curve)
    asked = with_spacing(CONFIGS[config], curve)
    close(mine, theirs(asked, "kdpm2-ancestral", steps, noises), TOLERANCE)


@pytest.mark.parametrize(("config", "steps"), list(itertools.product(CONFIGS, (2, 4, 25, 50))))
@pytest.mark.parametrize("name", ["dpmpp-2s", "lcm", "tcd"])
def test_samplers_with_a_spacing_of_their_own(name, config, steps, keys, noises, monkeypatch):
    """On the one spacing that these schedulers know, whatever a config says."""
    if name in ("lcm", "tcd"):
        draws_from(noises, name, monkeypatch)
    mine = ours(CONFIGS[config], name, steps, keys)
    close(mine, theirs(CONFIGS[config], name, steps, noises), TOLERANCE)


LISTING = [
    name
    for name, each in CLASSES.items()
    if "timesteps" in inspect.signature(each.set_timesteps).parameters
]


@pytest.mark.parametrize("times", [(800,), (999, 700, 300, 20)])
@pytest.mark.parametrize("name", LISTING)
def test_listed_timesteps(name, times, keys, noises, monkeypatch):
    if get_sampler(name).stochastic or name == "tcd":
        draws_from(noises, name, monkeypatch)
    config = CONFIGS["sd15"]
    mine = ours(config, name, len(times), keys, spacing=",".join(map(str, times)))
    close(mine, theirs(config, name, times, noises), TOLERANCE)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    "name", [name for name in CLASSES if name not in ("dpmpp-2s", "lcm", "tcd")]
)
def test_times_for_any_number_of_steps(name, spacing):
    config = with_spacing(CONFIGS["sd15"], spacing)
    scheduler = CLASSES[name].from_config(config)
    for steps in range(2, 200):
        scheduler.set_timesteps(steps)
        grid = make_grid(
            vp_schedule(config),
            name,
            steps,
            prediction_type="epsilon",
            options=SchedulerOptions.from_config(config),
        )
        times = scheduler.timesteps.tolist()
        times = times[::2] if name.startswith("kdpm2") else times  # between them those of middles
        # Times of two evaluations are there twice. For some numbers of steps, 61 the first, their
        # trailing grid has one more time: -1.
        expected = [*dict.fromkeys(times)][:steps]
        np.testing.assert_allclose(grid.t[0, :steps], expected, rtol=1e-6)


FLOWS = {
    "sd3": {"shift": 3.0},
    "plain": {},
    "flux": {"use_dynamic_shifting": True, "shift": 3.0},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 1.3},
    "terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.1},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {"shift": 3.0, "use_exponential_sigmas": True},
    "beta": {"shift": 3.0, "use_beta_sigmas": True},
}


@pytest.mark.parametrize("steps", [2, 7, 28])
@pytest.mark.parametrize("name", FLOWS)
def test_levels_of_flows(name, steps):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **FLOWS[name]}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    chosen = {}
    if config.get("use_dynamic_shifting"):
        # as FluxPipeline calls it, for 1024 tokens
        slope = (scheduler.config.max_shift - scheduler.config.base_shift) / (4096 - 256)
        chosen = {"mu": scheduler.config.base_shift + slope * (1024 - 256)}
        chosen["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(steps, **chosen)
    options = SchedulerOptions.from_config(config)
    grid = make_host_grid(schedule_of(config), "euler", steps, options=options, num_tokens=1024)
    np.testing.assert_allclose(grid.sigma, scheduler.sigmas, rtol=2e-6)
    np.testing.assert_allclose(grid.t[:-1], scheduler.timesteps, rtol=2e-6)


EDM_CLASSES = {
    "euler": diffusers.EDMEulerScheduler,
    "dpmpp-2m": diffusers.EDMDPMSolverMultistepScheduler,
}


@pytest.mark.parametrize("steps", [2, 7, 25])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("curve", ["karras", "exponential"])
@pytest.mark.parametrize("name", EDM_CLASSES)
def test_edm(name, curve, kind, steps, keys, noises):
    """Their latents are those of unit variance times sigma_data."""
    config = {
        "_class_name": EDM_CLASSES[name].__name__,
        "prediction_type": kind,
        "sigma_schedule": curve,
        "sigma_max": 70.0,
    }
    scheduler = EDM_CLASSES[name].from_config(config)
    scheduler.set_timesteps(steps)

    def network(xp, x, t, shape):
        return xp.tanh(1.3 * x + shape - 0.1 * t)

    # It carries the image beside noise of up to sigma_max.
    x = torch.from_numpy(noises[-1]).double() * scheduler.init_noise_sigma
    scheduler.sigmas = scheduler.sigmas.double()
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(torch, seen, t, torch.from_numpy(pattern())), t, x).prev_sample
    schedule, predicted = schedule_of(config), prediction_type_of(config)
    options = SchedulerOptions.from_config(config)
    assert sampler_name(config) == name
    grid = make_grid(schedule, name, steps, prediction_type=predicted, options=options)

    def call(weights, x, t, conditioning):
        return network(jnp, x, t.reshape(-1, 1, 1, 1), jnp.broadcast_to(pattern(), x.shape))

    denoise = guided_denoiser(
        call, (), None, UNGUIDED, rule=RULES["none"], prediction_type=predicted
    )
    latents = jax.jit(functools.partial(sample, denoise, sampler=get_sampler(name)))(
        initial_noise(keys, SHAPE), grid, keys
    )
    close(0.5 * np.asarray(latents), x.numpy(), TOLERANCE)


@pytest.mark.parametrize("curve", ["karras", "exponential"])
def test_levels_of_edm(curve):
    scheduler = diffusers.EDMEulerScheduler(sigma_schedule=curve)
    scheduler.set_timesteps(18)
    grid = make_host_grid(EDMSchedule(), "euler", 18, spacing=curve)
    np.testing.assert_allclose(0.5 * grid.sigma / grid.alpha, scheduler.sigmas, rtol=1e-5)
    np.testing.assert_allclose(grid.t[:-1], scheduler.timesteps, rtol=1e-5, atol=1e-6)
