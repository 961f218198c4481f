"""VAEs of their own between diffusers and jaxdiff: TAESD in pipelines, and converted files."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copier import agree, image, nchw, randomise
from diffusers import AutoencoderKL, AutoencoderTiny
from families import IMAGE_CLASSES, as_class, pipeline
from tiny import first_devices

import jaxdiff
from jaxdiff.cli import main

SHARED = {"guidance_scale": 4.0, "negative_prompt": "ij h"}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """A pipeline with a TAESD instead of its VAE, in diffusers and here."""
    folder = tmp_path_factory.mktemp("sd1")
    theirs = pipeline("sd1")
    theirs.save_pretrained(folder / "model")
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    )
    randomise(tiny).save_pretrained(folder / "taesd")
    theirs = type(theirs).from_pretrained(folder / "model", vae=tiny)
    theirs.set_progress_bar_config(disable=True)
    return theirs, first_devices(jaxdiff.load(folder / "model", vae=folder / "taesd"), 1)


def close(got, want):
    """Pixels, in 256 levels, of images that are not grey."""
    assert np.abs(np.asarray(got, np.float32) - 255 * want).max() < 1
    assert want.std() > 0.05


def test_text_to_image_with_taesd(pipes, noise):
    theirs, ours = pipes
    theirs = as_class(theirs, type(theirs), "ddim")
    want = theirs(
        "abc", num_inference_steps=5, latents=nchw(noise), output_type="np", **SHARED
    ).images
    close(ours("abc", steps=5, latents=noise, sampler="ddim", **SHARED).images[0], want[0])


def test_image_to_image_with_taesd(pipes, noise, picture):
    theirs, ours = pipes
    theirs = as_class(theirs, IMAGE_CLASSES["sd1"], "ddim")
    shared = {"image": picture, "strength": 0.5, **SHARED}
    want = theirs("abc", num_inference_steps=6, output_type="np", **shared).images
    close(ours("abc", steps=6, latents=noise, sampler="ddim", **shared).images[0], want[0])


def test_converted_vaes(tmp_path):
    """From diffusers to the original layout, which it reads, and back."""
    theirs = randomise(
        AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            scaling_factor=0.13025,
        )
    )
    theirs.save_pretrained(tmp_path / "vae")
    file, folder = tmp_path / "vae.safetensors", tmp_path / "again"
    assert main.run("convert", [str(tmp_path / "vae"), str(file)]) == 0
    assert main.run("convert", [str(file), str(folder), "--scaling-factor", "0.13025"]) == 0
    for read in (
        AutoencoderKL.from_single_file(str(file), config=str(tmp_path / "vae")),
        AutoencoderKL.from_pretrained(folder),
    ):
        assert read.config.scaling_factor == 0.13025
        for name, values in theirs.state_dict().items():
            assert torch.equal(read.state_dict()[name], values), name


def test_a_taesd_that_is_saved(pipes, tmp_path):
    theirs, ours = pipes
    ours.save(tmp_path / "saved")
    read = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(read.vae, AutoencoderTiny)
    z = image((1, 8, 8, 4))
    assert torch.equal(read.vae.decode(nchw(z)).sample, theirs.vae.decode(nchw(z)).sample)
    agree(ours.vae.decode(jnp.asarray(z)), theirs.vae.decode(nchw(z)).sample)
