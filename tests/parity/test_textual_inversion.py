"""Textual inversion files of diffusers, of one vector and of several."""

import numpy as np
import pytest
import torch
from copier import image, nchw
from families import pipeline
from safetensors.torch import save_file
from tiny import first_devices

import jaxdiff

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_latents(tmp_path, count):
    vectors = torch.randn((count, 12), generator=torch.Generator().manual_seed(0))
    save_file({"<x>": vectors}, tmp_path / "learned_embeds.safetensors")
    theirs = pipeline("sd1")
    theirs.save_pretrained(tmp_path / "model")
    theirs.load_textual_inversion(tmp_path / "learned_embeds.safetensors", token="<x>")
    theirs.set_progress_bar_config(disable=True)
    ours = first_devices(jaxdiff.load(tmp_path / "model", dtype="float32"), 1)
    ours.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    noise = image((1, 8, 8, 4))
    way = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    want = theirs("ab <x> c", latents=nchw(noise), **way).images.numpy().transpose(0, 2, 3, 1)
    way = {"steps": 3, "guidance_scale": 2.0, "output": "latent"}
    got = ours("ab <x> c", latents=noise, **way).images
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    other = ours("ab c", latents=noise, **way).images
    assert np.abs(got - other).max() > 1e-3 * np.abs(want).max()
