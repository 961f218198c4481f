"""Looking at the loop: what is seen belongs to the picture, and looking changes nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.core.errors import InputError

PROMPTS = ["a small red circle", "a large blue star", "a ring"]
SHARED = {"seed": 3, "steps": 5, "output": "latent"}


@pytest.fixture(scope="module")
def shown(single):
    return single(PROMPTS, sampler="ddim", intermediate_steps=range(5), **SHARED)


def test_the_first_and_the_last_of_what_is_seen_are_noise_and_image(single, shown):
    """From unit noise (the grid starts at 1), and DDIM ends with alpha = 1 on its last D."""
    noise = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
    out = single(PROMPTS, sampler="ddim", latents=noise, intermediate_steps=[0], **SHARED)
    assert np.array_equal(out.intermediates.x[0], noise)
    assert np.array_equal(shown.intermediates.x0[-1], shown.images)


def test_consecutive_looks_are_ddim_steps(shown):
    """x' = alpha' D + sigma' (x - alpha D) / sigma (2010.02502, eq. 12)."""
    seen = shown.intermediates
    assert seen.steps == tuple(range(5))
    for i in range(4):
        eps = (seen.x[i] - seen.alpha[i] * seen.x0[i]) / seen.sigma[i]
        want = seen.alpha[i + 1] * seen.x0[i] + seen.sigma[i + 1] * eps
        assert np.abs(seen.x[i + 1] - want).max() < 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp-2m"])
def test_watching_changes_no_bit_and_compiles_nothing(single, sampler):
    plain = single(PROMPTS, sampler=sampler, **SHARED)
    before = single.stages.compilations
    out = single(PROMPTS, sampler=sampler, intermediate_steps=[3, 1, 3], **SHARED)
    assert np.array_equal(out.images, plain.images)
    assert single.stages.compilations == before
    assert out.intermediates.steps == (1, 3)
    assert plain.intermediates.steps == ()


def test_what_is_seen_of_an_image_does_not_depend_on_its_batch(one_device, pipe):
    look = {"sampler": "ddim", "intermediate_steps": [1, 4], **SHARED}
    whole = one_device(PROMPTS, **look).intermediates
    for other, size in ((one_device, 2), (pipe, None)):
        cut = other(PROMPTS, batch_size=size, **look).intermediates
        for name in ("x", "x0"):
            want = getattr(whole, name)
            assert np.abs(getattr(cut, name) - want).max() < 1e-5 * np.abs(want).max()


def test_latents_become_images_on_any_devices(single, pipe):
    latents = single(PROMPTS, **SHARED).images
    want = np.asarray(single.vae.decode(jnp.asarray(latents) / 0.7))
    want = np.clip(want / 2 + 0.5, 0, 1) * 255
    for one in (single, pipe):
        got = one.decode_latents(latents)
        assert got.dtype == np.uint8
        assert np.abs(got - want).max() < 0.502


def test_noisy_latents_are_brought_to_one_spread(shown):
    seen = shown.intermediates
    assert np.array_equal(seen.unit_variance[0], seen.x[0])
    spread = np.hypot(seen.alpha, seen.sigma)[:, None, None, None, None]
    assert np.allclose(seen.unit_variance * spread, seen.x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [-1, 5])
def test_steps_that_are_not_run_cannot_be_watched(single, step):
    with pytest.raises(
        InputError, match=f"intermediate_steps: got {step}, expected a number from 0 to 4"
    ):
        single(PROMPTS, intermediate_steps=[step], **SHARED)


def test_a_part_of_the_way_has_the_steps_of_the_whole(single, shown):
    options = {"sampler": "ddim", "denoising_end": 0.6, **SHARED}
    half = single(PROMPTS, intermediate_steps=[1], **options).intermediates
    assert np.array_equal(half.x[0], shown.intermediates.x[1])
    with pytest.raises(InputError, match="intermediate_steps: got 4"):
        single(PROMPTS, intermediate_steps=[4], **options)


def test_former_names_of_arguments(single):
    shown = []
    options = {"sampler": "ddim", **SHARED}
    former = single(PROMPTS, watch=[1], report=lambda *each: shown.append(each), **options)
    out = single(PROMPTS, intermediate_steps=[1], **options)
    assert np.array_equal(former.watched.x0, out.intermediates.x0)
    assert shown[-1][0] == shown[-1][1]
    with pytest.raises(InputError, match="intermediate_steps: got watch too"):
        single(PROMPTS, watch=[1], intermediate_steps=[1], **options)
