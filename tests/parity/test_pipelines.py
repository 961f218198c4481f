"""Whole pipelines against diffusers, from the same start noise: every family, every task."""

import numpy as np
import pytest
from copier import nchw
from families import IMAGE_CLASSES, INPAINT_CLASSES, as_class, pipeline
from tiny import first_devices

import jaxdiff
from jaxdiff.pipeline.cascade import refine

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LIMIT = 1e-3  # relative error of the final latents
STEPS = 20
PROMPT, NEGATIVE = "abc de", "ij h"

_PIPES = {}


def both(family, tmp_path_factory):
    """The family's pipeline in diffusers and here, through a folder."""
    if family not in _PIPES:
        folder = tmp_path_factory.mktemp(family)
        pipeline(family).save_pretrained(folder)
        cls = type(pipeline(family))
        theirs = cls.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        _PIPES[family] = theirs, first_devices(jaxdiff.load(folder, dtype="float32"), 1)
    return _PIPES[family]


@pytest.fixture
def pipes(request, tmp_path_factory):
    return both(request.param, tmp_path_factory)


def families(*names):
    return pytest.mark.parametrize("pipes", names, indirect=True)


def agree(got, want, start=0.0):
    reference = want.detach().numpy().transpose(0, 2, 3, 1)
    error = np.abs(got - reference).max() / np.abs(reference).max()
    assert error < LIMIT, error
    # The pictures differ from where they began: something was drawn.
    assert np.abs(reference - start).max() > 0.1


# Each with a guidance of its own: which goes with which changes nothing.
SAMPLERS = {
    "ddim": {"guidance_scale": 1.0},
    "euler": {"guidance_scale": 5.0},
    "dpmpp-2m": {"guidance_scale": 3.0, "negative_prompt": NEGATIVE},
}


def strengths(classes, low):
    """Every sampler from both strengths with one family; from one of them with each other."""
    cases = [("sd1", sampler, strength) for sampler in SAMPLERS for strength in (low, 1.0)]
    for family in classes:
        if family != "sd1":
            cases += [(family, "euler", low), (family, "dpmpp-2m", 1.0)]
    return pytest.mark.parametrize(("family", "sampler", "strength"), cases)


@pytest.mark.parametrize(
    ("pipes", "sampler"),
    [("sd1", "pndm"), ("sdxl", "pndm"), ("sd1", "heun"), ("sd2", "unipc"), ("sdxl", "dpmpp-2s")],
    indirect=["pipes"],
)
def test_other_samplers(pipes, noise, sampler):
    theirs, ours = pipes
    theirs = as_class(theirs, type(theirs), sampler)
    shared = {"guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    want = theirs(
        PROMPT, num_inference_steps=STEPS, latents=nchw(noise), output_type="latent", **shared
    ).images
    got = ours(PROMPT, steps=STEPS, latents=noise, output="latent", sampler=sampler, **shared)
    agree(got.images, want, noise)


@pytest.mark.parametrize("sampler", SAMPLERS)
@families("sd1", "sd2", "sdxl")
def test_text_to_image(pipes, noise, sampler):
    theirs, ours = pipes
    options = SAMPLERS[sampler]
    theirs = as_class(theirs, type(theirs), sampler)
    want = theirs(
        PROMPT, num_inference_steps=STEPS, latents=nchw(noise), output_type="latent", **options
    ).images
    got = ours(
        PROMPT, steps=STEPS, latents=noise, output="latent", sampler=sampler, **options
    ).images
    agree(got, want, noise)


@families("turbo")
def test_one_step_without_guidance(pipes, noise):
    theirs, ours = pipes
    want = theirs(
        PROMPT,
        num_inference_steps=1,
        guidance_scale=0.0,
        latents=nchw(noise),
        output_type="latent",
    ).images
    # Both are the model's defaults here; diffusers means by a scale of 0 what is 1 here.
    assert (ours.defaults.steps, ours.defaults.guidance_scale) == (1, 1.0)
    agree(ours(PROMPT, latents=noise, output="latent").images, want, noise)


@strengths(IMAGE_CLASSES, 0.33)
def test_image_to_image(family, tmp_path_factory, noise, picture, sampler, strength):
    theirs, ours = both(family, tmp_path_factory)
    theirs = as_class(theirs, IMAGE_CLASSES[family], sampler)
    shared = {"image": picture, "strength": strength, **SAMPLERS[sampler]}
    want = theirs(PROMPT, num_inference_steps=STEPS, output_type="latent", **shared).images
    got = ours(
        PROMPT, steps=STEPS, latents=noise, output="latent", sampler=sampler, **shared
    ).images
    agree(got, want)


@strengths(INPAINT_CLASSES, 0.5)
def test_inpainting(family, tmp_path_factory, noise, picture, mask, sampler, strength):
    options = SAMPLERS[sampler]
    compare_inpainting(family, tmp_path_factory, noise, picture, mask, sampler, options, strength)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_inpainting_with_two_calls_a_step(family, tmp_path_factory, noise, picture, mask, strength):
    options = {"guidance_scale": 4.0}
    compare_inpainting(family, tmp_path_factory, noise, picture, mask, "heun", options, strength)


def compare_inpainting(family, tmp_path_factory, noise, picture, mask, sampler, options, strength):
    theirs, ours = both(family, tmp_path_factory)
    theirs = as_class(theirs, INPAINT_CLASSES[family], sampler)
    shared = {"image": picture, "strength": strength, **options}
    want = theirs(
        PROMPT,
        num_inference_steps=STEPS,
        output_type="latent",
        mask_image=mask,
        height=16,
        width=16,
        **shared,
    ).images
    got = ours(
        PROMPT, steps=STEPS, latents=noise, output="latent", sampler=sampler, mask=mask, **shared
    ).images
    agree(got, want)


def test_base_then_refiner(tmp_path_factory, noise):
    """80% of the way by the base model, the rest by the refiner."""
    base, our_base = both("sdxl", tmp_path_factory)
    refiner, our_refiner = both("refiner", tmp_path_factory)
    options = {"guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    way = {"num_inference_steps": STEPS, "output_type": "latent"}
    middle = base(PROMPT, latents=nchw(noise), denoising_end=0.8, **way, **options).images
    want = refiner(PROMPT, image=middle, denoising_start=0.8, **way, **options).images
    way = {"steps": STEPS, "output": "latent"}
    got = our_base(PROMPT, latents=noise, denoising_end=0.8, **way, **options).images
    agree(got, middle)
    got = our_refiner(PROMPT, image=got, denoising_start=0.8, **way, **options).images
    agree(got, want)


@families("sdxl")
def test_sizes_that_xl_is_told(pipes, noise):
    theirs, ours = pipes
    sizes = {
        "original_size": (100, 50),
        "target_size": (40, 30),
        "guidance_scale": 3.0,
    }
    want = theirs(
        PROMPT,
        num_inference_steps=STEPS,
        latents=nchw(noise),
        output_type="latent",
        crops_coords_top_left=(4, 2),
        **sizes,
    ).images
    options = {"steps": STEPS, "latents": noise, "output": "latent"}
    agree(ours(PROMPT, crop_top_left=(4, 2), **options, **sizes).images, want, noise)
    plain = ours(PROMPT, guidance_scale=3.0, **options).images
    assert np.abs(plain - want.numpy().transpose(0, 2, 3, 1)).max() > 1e-2


@pytest.mark.parametrize(
    "second",
    [
        {"prompt_2": "fgh a"},
        {"negative_prompt": NEGATIVE, "negative_prompt_2": "b ca"},
        {"prompt_2": "fgh a", "negative_prompt": "", "negative_prompt_2": "b ca"},
    ],
    ids=["prompt", "negative", "both"],
)
@families("sdxl")
def test_two_prompts(pipes, noise, second):
    theirs, ours = pipes
    want = theirs(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=nchw(noise),
        output_type="latent",
        **second,
    ).images
    options = {"steps": STEPS, "latents": noise, "output": "latent", "guidance_scale": 3.0}
    agree(ours(PROMPT, **second, **options).images, want, noise)
    first = {k: v for k, v in second.items() if not k.endswith("_2")}
    plain = ours(PROMPT, **first, **options).images
    assert np.abs(plain - want.numpy().transpose(0, 2, 3, 1)).max() > 1e-2


def test_base_then_refiner_with_two_prompts(tmp_path_factory, noise):
    """The refiner has one encoder, which reads the first prompt in diffusers too."""
    base, our_base = both("sdxl", tmp_path_factory)
    refiner, our_refiner = both("refiner", tmp_path_factory)
    options = {"prompt_2": "fgh a", "guidance_scale": 4.0}
    way = {"num_inference_steps": STEPS, "output_type": "latent"}
    middle = base(PROMPT, latents=nchw(noise), denoising_end=0.8, **way, **options).images
    want = refiner(PROMPT, image=middle, denoising_start=0.8, **way, **options).images
    way = {"steps": STEPS, "output": "latent", "latents": noise}
    agree(refine(our_base, our_refiner, PROMPT, **way, **options).images, want)


NULL_SIZES = {"negative_original_size": (90, 20), "negative_target_size": (30, 60)}


@pytest.mark.parametrize("crop", [None, (3, 7)])
@families("sdxl")
def test_sizes_of_the_null_stream(pipes, noise, crop):
    theirs, ours = pipes
    their_crop = {} if crop is None else {"negative_crops_coords_top_left": crop}
    want = theirs(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=nchw(noise),
        output_type="latent",
        crops_coords_top_left=(4, 2),
        **their_crop,
        **NULL_SIZES,
    ).images
    options = {"steps": STEPS, "latents": noise, "output": "latent", "guidance_scale": 3.0}
    options["crop_top_left"] = (4, 2)
    got = ours(PROMPT, negative_crop_top_left=crop, **NULL_SIZES, **options).images
    agree(got, want, noise)
    same = ours(PROMPT, **options).images
    assert np.abs(same - want.numpy().transpose(0, 2, 3, 1)).max() > 1e-2


@pytest.mark.parametrize("crop", [None, (3, 7)])
@families("refiner")
def test_sizes_of_the_refiners_null_stream(pipes, noise, picture, crop):
    theirs, ours = pipes
    shared = {"image": picture, "strength": 0.8, "guidance_scale": 3.0}
    shared["negative_original_size"] = (90, 20)
    their_crop = {} if crop is None else {"negative_crops_coords_top_left": crop}
    want = theirs(
        PROMPT,
        num_inference_steps=STEPS,
        output_type="latent",
        crops_coords_top_left=(4, 2),
        **their_crop,
        **shared,
    ).images
    options = {"steps": STEPS, "latents": noise, "output": "latent", "crop_top_left": (4, 2)}
    agree(ours(PROMPT, negative_crop_top_left=crop, **options, **shared).images, want)


@families("sd1")
def test_images(pipes, noise):
    """Through the VAE and to bytes: nowhere more than one step of brightness apart."""
    theirs, ours = pipes
    want = theirs(PROMPT, num_inference_steps=4, latents=nchw(noise), output_type="np").images
    got = ours(PROMPT, steps=4, latents=noise, output="numpy").images
    assert np.abs(got / 255 - want).max() < 1.01 / 255
