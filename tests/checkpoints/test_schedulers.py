"""Scheduler configs: what classes and pipelines of diffusers make of them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.checkpoints.configs import native_sample_size
from jaxdiff.checkpoints.schedulers import (
    SchedulerOptions,
    clipping_of,
    prediction_type_of,
    schedule_of,
    vp_schedule,
)
from jaxdiff.checkpoints.timestep_grids import make_host_grid
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import EDMSchedule, VPSchedule
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig

PNDM = {"_class_name": "PNDMScheduler"}


def test_missing_keys_have_the_defaults_of_the_class():
    stable = {"beta_start": 0.00085, "beta_end": 0.012}
    assert vp_schedule({"_class_name": "HeunDiscreteScheduler"}) == VPSchedule(**stable)
    lcm = VPSchedule(beta_schedule="scaled_linear", **stable)
    assert vp_schedule({"_class_name": "FlaxLCMScheduler"}) == lcm
    assert vp_schedule(PNDM) == VPSchedule()
    own = {"_class_name": "LCMScheduler", "beta_schedule": "linear", "beta_end": 0.02}
    assert vp_schedule(own) == VPSchedule(beta_start=0.00085, beta_end=0.02)


@pytest.mark.parametrize("given", [{}, {"steps_offset": 0}, {"steps_offset": 3}])
def test_pipelines_of_stable_diffusion_1_and_2_set_steps_offset(given):
    for task in ("", "Img2Img", "Inpaint"):
        options = SchedulerOptions.from_config(PNDM | given, f"StableDiffusion{task}Pipeline")
        assert options.steps_offset == 1
    for other in ("StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"):
        options = SchedulerOptions.from_config(PNDM | given, other)
        assert options.steps_offset == given.get("steps_offset", 0)


def test_clip_sample_is_a_sentence_where_diffusers_clips_latents(recwarn):
    ddim = {"_class_name": "DDIMScheduler"}
    xl = {"pixels": False, "pipeline_class": "StableDiffusionXLPipeline"}
    assert clipping_of(ddim, pixels=False, pipeline_class="StableDiffusionPipeline") is None
    assert clipping_of(ddim | {"clip_sample": False}, **xl) is None
    assert clipping_of({"_class_name": "EulerDiscreteScheduler", "clip_sample": True}, **xl) is None
    assert not recwarn
    for config in (ddim, {"_class_name": "LCMScheduler", "clip_sample": True}):
        with pytest.warns(UserWarning, match="clip_sample is true.*has no effect here"):
            assert clipping_of(config, **xl) is None


def test_clipping_of_pixels_is_a_wrapper():
    ddpm = {"_class_name": "DDPMScheduler"}
    assert clipping_of(ddpm, pixels=True) == "clip-sample:limit=1.0"
    assert clipping_of(ddpm | {"clip_sample_range": 5}, pixels=True) == "clip-sample:limit=5"
    dynamic = ddpm | {"thresholding": True, "dynamic_thresholding_ratio": 0.95}
    for pixels in (True, False):  # which comes before clip_sample
        found = clipping_of(dynamic | {"sample_max_value": 1.5}, pixels=pixels)
        assert found == "threshold:percentile=0.95,max_limit=1.5"
    assert clipping_of(dynamic, pixels=True) == "threshold:percentile=0.95,max_limit=1.0"


def test_no_level_below_lambda_min():
    """Of DPM-Solver's grids of times, whose first level is the noisiest that is not below."""
    cosine = VPSchedule(beta_schedule="squaredcos_cap_v2")
    options = SchedulerOptions.from_config({"lambda_min_clipped": -5.1})
    lam = -np.log(cosine.sigma_edm)
    highest = int(np.max(np.flatnonzero(lam >= -5.1)))
    assert highest < 999
    for spacing in ("linspace", "trailing"):
        grid = make_host_grid(cosine, "dpmpp-2m", 10, options=options, spacing=spacing)
        assert grid.t[0] == highest
        assert math.log(grid.alpha[0] / grid.sigma[0]) == pytest.approx(lam[highest])
    leading = make_host_grid(cosine, "dpmpp-2m", 9, options=options, spacing="leading")
    np.testing.assert_array_equal(leading.t[:-1], np.arange(9, 0, -1) * ((highest + 1) // 10))
    for other in ("ddim", "unipc"):  # whose classes do not know it
        grid = make_host_grid(cosine, other, 10, options=options, spacing="trailing")
        assert grid.t[0] == 999
    with pytest.raises(InputError, match="lambda_min_clipped: got 1"):
        SchedulerOptions.from_config({"lambda_min_clipped": 1})


def test_old_unets_were_trained_at_64():
    sd, old = "StableDiffusionInpaintPipeline", {"_diffusers_version": "0.6.0.dev0"}
    assert native_sample_size(old, 32, sd) == 64
    assert native_sample_size(old, 96, sd) == 96
    assert native_sample_size(old, (32, 48), sd) == (32, 48)
    assert native_sample_size(old, 32, "StableDiffusionXLPipeline") == 32
    for version in ({}, {"_diffusers_version": "0.10.2"}, {"_diffusers_version": "0.9.0.dev0"}):
        assert native_sample_size(version, 32, sd) == 32


def test_schedules_of_edm():
    config = {"_class_name": "EDMEulerScheduler", "sigma_max": 70, "sigma_schedule": "exponential"}
    assert schedule_of(config) == EDMSchedule(sigma_max=70.0)
    assert prediction_type_of(config) == "edm"
    assert prediction_type_of(config | {"prediction_type": "v_prediction"}) == "v_prediction"
    assert SchedulerOptions.from_config(config).sigma_schedule == "exponential"
    low = SchedulerOptions.from_config(config | {"final_sigmas_type": "sigma_min"})
    grid = make_host_grid(EDMSchedule(), "euler", 4, options=low)
    assert 0.5 * grid.sigma[-1] / grid.alpha[-1] == pytest.approx(0.002)
    with pytest.raises(InputError, match="rho: got 5, expected 7"):
        SchedulerOptions.from_config(config | {"rho": 5})


def test_latents_with_a_mean_and_a_deviation_of_each_channel():
    """z = y std / scaling_factor + mean."""
    moments = {"latents_mean": (1.0, -2.0), "latents_std": (4.0, 0.5)}
    common = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 2}
    vae = AutoencoderKL(AutoencoderKLConfig(**common, **moments, scaling_factor=0.5), rngs=None)
    y = jnp.asarray([[[[3.0, -1.0]]]])
    np.testing.assert_allclose(vae.unscale(y), [[[[3 * 8 + 1, -1 * 1 - 2]]]], rtol=1e-6)
    np.testing.assert_allclose(vae.scale(vae.unscale(y)), y, rtol=1e-6)
    with pytest.raises(InputError, match="latents_std: got one of them"):
        AutoencoderKLConfig(latents_mean=(0.0,) * 4)
