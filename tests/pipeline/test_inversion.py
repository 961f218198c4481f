"""DDIM inversion in the pipeline: from an image to noise, from which a call comes back to it."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxdiff.core.errors import InputError
from jaxdiff.data.tokenizer import tokenize

ROOT = pathlib.Path(__file__).parents[2]
PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def latents():
    """Of three images."""
    return np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)


def reference_noise(pipe, prompt, latents, steps, w):
    """The ODE of DDIM upwards (2010.02502, eq. 14) by Euler's steps, written out in float64.

    With guidance (2207.12598, eq. 6), and levels from abar alone. The first step asks the network
    about the clean image as if it were at the level above.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    times = np.arange(steps) * (1000 // steps) + 1
    call = nnx.jit(lambda module, *arguments: module(*arguments))
    ids = [jnp.asarray(tokenize(pipe.tokenizer, [text] * len(latents))) for text in ("", prompt)]
    contexts = [call(pipe.text_encoder, i) for i in ids]
    scaled = np.asarray(latents, np.float64)  # x / alpha
    for i, t in enumerate(times):
        asked = times[max(i - 1, 0)]
        a, s = np.sqrt(abar[asked]), np.sqrt(1 - abar[asked])
        x = a * scaled
        inputs = jnp.asarray(x, jnp.float32), jnp.full(len(x), float(asked))
        uncond, cond = (np.asarray(call(pipe.unet, *inputs, c), np.float64) for c in contexts)
        eps = s * x + a * (uncond + w * (cond - uncond))
        ratio = 0 if i == 0 else s / a
        scaled += (np.sqrt(1 / abar[t] - 1) - ratio) * eps
    return np.sqrt(abar[times[-1]]) * scaled


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_the_noise_equals_a_plain_reference(single, latents, w):
    got = single.invert(latents, PROMPT, guidance_scale=w, steps=4)
    expected = reference_noise(single, PROMPT, latents, 4, w)
    assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


def test_there_and_back_is_the_same_image_to_first_order(single, latents):
    def error(steps):
        noise = single.invert(latents, PROMPT, steps=steps)
        options = {"guidance_scale": 1.0, "sampler": "ddim", "steps": steps, "output": "latent"}
        back = single([PROMPT] * len(latents), latents=noise, **options).images
        return np.abs(back - latents).max()

    steps = [25, 50, 100, 200]
    slope = np.polyfit(np.log(steps), np.log([error(n) for n in steps]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.15)


def test_images_are_encoded_first(single):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    encoded = np.asarray(single.vae.encode(jnp.asarray(pixels / 127.5 - 1, jnp.float32))[0])
    scale = single.vae.config.scaling_factor
    expected = single.invert(scale * encoded, steps=3)
    np.testing.assert_allclose(single.invert(pixels, steps=3), expected, rtol=1e-4, atol=1e-5)


def test_batches_and_devices_change_nothing(pipe, single, latents):
    prompts = [PROMPT, "a blue ring", ""]
    expected = single.invert(latents, prompts, steps=[3, 4, 4])
    parts = single.invert(latents, prompts, steps=[3, 4, 4], batch_size=2)
    np.testing.assert_allclose(parts, expected, rtol=1e-5, atol=1e-5)
    on_all = tiny.with_linear_unet(pipe).invert(latents, prompts, steps=[3, 4, 4])
    np.testing.assert_allclose(on_all, expected, rtol=1e-5, atol=1e-5)
    alone = single.invert(latents[:1], PROMPT, num_inference_steps=3)
    np.testing.assert_allclose(alone, expected[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "seed: got 3, expected none for an inversion"),
        ({"strength": 0.5}, "strength: got 0.5, expected none for an inversion"),
        ({"mask": np.ones((16, 16), bool)}, "mask: got array.*, expected none for an inversion"),
        ({"sampler": "ddpm"}, "sampler: got 'ddpm', expected one that adds no noise"),
        ({"sampler": "ddim:eta=0.5"}, "sampler: got 'ddim:eta=0.5', expected one that adds no"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"stepz": 3}, "stepz: got an unknown argument"),
    ],
)
def test_options_that_it_does_not_read_are_refused(single, latents, options, message):
    with pytest.raises(InputError, match=message):
        single.invert(latents, PROMPT, **options)


@pytest.mark.parametrize(("image", "message"), [(None, "None"), ([], "an empty list")])
def test_no_image_cannot_be_inverted(single, image, message):
    with pytest.raises(InputError, match=f"^image: got {message}, expected"):
        single.invert(image, PROMPT)


@pytest.mark.slow
def test_the_example_of_the_page(tmp_path, monkeypatch):
    """The star comes back red, and in the same place blue."""
    page = (ROOT / "docs" / "sampling.md").read_text()
    code = re.search(r"## Inversion.*?```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code[1], names)
    image, same, blue = (
        np.asarray(each, float)
        for each in (names["image"], names["same"].images[0], names["blue"].images[0])
    )
    assert np.abs(same - image).mean() < 2  # of 255
    was_red, is_blue = (
        each[..., a] - each[..., b] > 100 for each, a, b in ((image, 0, 2), (blue, 2, 0))
    )
    assert was_red.sum() > 500
    assert np.sum(was_red & is_blue) > 0.8 * np.sum(was_red | is_blue)
    assert {path.name for path in tmp_path.iterdir()} == {"same.png", "blue.png"}
