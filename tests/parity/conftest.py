"""Noise and pictures that both programs are given."""

import numpy as np
import pytest
import torch
from copier import image, nchw
from PIL import Image

# Threads that wait for one another take most of the time of arrays this small.
torch.set_num_threads(1)

RANDOM = (
    "stable_diffusion.pipeline_stable_diffusion_img2img",
    "stable_diffusion.pipeline_stable_diffusion_inpaint",
    "stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img",
    "stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint",
)


@pytest.fixture
def noise(monkeypatch):
    """The start noise, which diffusers draws too; its VAE draws the mean of its latents."""
    noise = image((1, 8, 8, 4), seed=5)

    def draw(shape, *_, dtype=None, **__):
        assert tuple(shape) == (1, 4, 8, 8)
        return nchw(noise).to(dtype)

    for name in RANDOM:
        monkeypatch.setattr(f"diffusers.pipelines.{name}.randn_tensor", draw)
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.randn_tensor", lambda shape, **_: torch.zeros(shape)
    )
    return noise


@pytest.fixture
def picture():
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def mask():
    pixels = np.zeros((16, 16), np.uint8)
    pixels[3:11, 5:] = 255
    return Image.fromarray(pixels)
