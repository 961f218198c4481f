"""Scheduler configs: what classes and pipelines of diffusers make of them."""

import math

import numpy as np
import pytest

from jaxdiff.checkpoints.configs import native_sample_size
from jaxdiff.checkpoints.schedulers import SchedulerOptions, vp_schedule
from jaxdiff.checkpoints.timestep_grids import make_host_grid
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import VPSchedule

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


def test_clip_sample_is_a_sentence_where_diffusers_clips(recwarn):
    ddim = {"_class_name": "DDIMScheduler"}
    xl = "StableDiffusionXLPipeline"
    SchedulerOptions.from_config(ddim, "StableDiffusionPipeline")
    SchedulerOptions.from_config(ddim | {"clip_sample": False}, xl)
    SchedulerOptions.from_config({"_class_name": "EulerDiscreteScheduler", "clip_sample": True}, xl)
    assert not recwarn
    for config in (ddim, {"_class_name": "LCMScheduler", "clip_sample": True}):
        with pytest.warns(UserWarning, match="clip_sample is true.*has no effect here"):
            SchedulerOptions.from_config(config, xl)


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
