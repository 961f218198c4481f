"""The embedded model: PyTorch diffusers loads its folder and draws the same pictures."""

import numpy as np
import pytest
import torch
from copier import image, nchw
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

import jaxdiff
from jaxdiff.checkpoints.embedded import EMBEDDED

# Raised inside diffusers' schedulers by numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPTS = ["a small red circle above a large blue square", "a large cyan star on a pink background"]
CHANNELS = 16


@pytest.fixture(scope="module")
def theirs():
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decibels(image: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of byte pictures; 99 for equal ones."""
    error = np.mean((image.astype(np.float64) - other) ** 2)
    return 10 * np.log10(255**2 / error) if error else 99.0


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m"])
def test_same_latents_give_the_same_images(theirs, sampler):
    pipe = jaxdiff.load(dtype="float32")
    options = {"guidance_scale": pipe.defaults.guidance_scale}
    steps = pipe.defaults.steps
    noise = image((len(PROMPTS), 8, 8, CHANNELS))
    if sampler == "dpmpp-2m":
        theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    expected = theirs(
        PROMPTS, latents=nchw(noise), num_inference_steps=steps, output_type="np", **options
    ).images
    ours = pipe(
        PROMPTS, latents=noise, steps=steps, sampler=sampler, output="numpy", **options
    ).images
    assert ours.std() > 20  # pictures, not one colour
    for mine, other in zip(ours, np.rint(255 * expected), strict=True):
        assert decibels(mine, other) > 40
