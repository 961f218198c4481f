"""Pictures, masks and latents to begin with, partial ways, two passes, LoRAs: on a tiny model."""

import numpy as np
import originals
import pytest
import tiny
from PIL import Image

from jaxdiff.checkpoints.key_mapping import torch_shape
from jaxdiff.core.errors import InputError
from jaxdiff.data import image_arrays
from jaxdiff.data.image_arrays import image_array, mask_array
from jaxdiff.models.build import param_dict
from jaxdiff.pipeline.cascade import hires_fix, refine
from jaxdiff.pipeline.image_inputs import CallImages, by_request
from jaxdiff.pipeline.stages import Refiner

PROMPT = "a small red circle"
LATENT = {"output": "latent", "seed": 3}


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(pipe, picture):
    """The latents of a picture."""
    pixels = pipe.stages.shard(image_arrays.image_array(picture, 16, 16))
    return pipe.stages.gather(pipe.stages.latents(pixels))


def near(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def test_where_the_mask_is_black_the_image_stays(single, picture):
    mask = np.zeros((16, 16), bool)
    mask[:, 8:] = True
    out = single(PROMPT, image=picture, mask=mask, strength=0.5, **LATENT).images[0]
    kept = encoded(single, picture)[0]
    np.testing.assert_array_equal(out[:, :4], kept[:, :4])
    assert np.abs(out[:, 4:] - kept[:, 4:]).max() > 0.1


def test_a_white_mask_at_full_strength_is_drawing_from_words(single, picture):
    white = Image.new("L", (16, 16), 255)
    masked = single(PROMPT, image=picture, mask=white, **LATENT).images
    assert near(masked, single(PROMPT, **LATENT).images) < 1e-6


@pytest.mark.parametrize("sampler", ["ddim", "euler", "ddpm"])
def test_two_parts_of_the_way_are_the_whole(single, sampler):
    """Rules of one step keep nothing but x, so that another call can go on with it."""
    way = {"sampler": sampler, "steps": 5, **LATENT}
    whole = single(PROMPT, **way).images
    half = single(PROMPT, denoising_end=0.6, **way).images
    assert near(half, whole) > 1e-2
    rest = single(PROMPT, image=half, denoising_start=0.6, **way).images
    assert near(rest, whole) < 1e-6


def test_latents_on_the_way_are_those_of_diffusers_schedulers(single):
    """x / alpha where these carry it; both samplers make the same step."""
    way = {"steps": 5, "timestep_spacing": "trailing", "denoising_end": 0.6, **LATENT}
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    x = single(PROMPT, sampler="ddim", latents=noise, **way).images
    ratio = single(PROMPT, sampler="euler", latents=noise / single.schedule.sigma[-1], **way).images
    assert near(single.schedule.alpha[399] * ratio, x) < 1e-5
    rest = {"denoising_start": 0.6, "steps": 5, "timestep_spacing": "trailing", **LATENT}
    ends = [
        single(PROMPT, image=z, sampler=s, **rest).images
        for z, s in ((x, "ddim"), (ratio, "euler"))
    ]
    assert near(*ends) < 1e-5


def test_a_refiner_takes_over_from_another_sampler(single):
    """DDIM and Euler make the same steps, so that who makes them makes no difference."""
    way = {"steps": 5, "timestep_spacing": "leading", **LATENT}
    whole = single(PROMPT, sampler="ddim", **way).images
    for pair in (("ddim", "euler"), ("euler", "ddim")):
        first = single(PROMPT, sampler=pair[0], denoising_end=0.6, **way)
        own = {"steps": 5, "timestep_spacing": "leading", "seed": 3, "sampler": pair[1]}
        after = Refiner(single, 0.6).run(first, {"prompt": PROMPT, **own}, output="latent")
        assert near(after.images, whole) < 1e-5


def test_handing_over_to_the_same_model_changes_nothing(single):
    whole = single(PROMPT, **LATENT)
    shared = refine(single, single, PROMPT, start=0.5, **LATENT)
    assert near(shared.images, whole.images) < 1e-6
    assert shared.timings.keys() == whole.timings.keys()


def test_an_option_that_neither_model_reads_is_refused(single):
    with pytest.raises(InputError, match=r"^aesthetic_score: got 7.0, expected none for"):
        refine(single, single, PROMPT, aesthetic_score=7.0, **LATENT)


def test_strength_is_how_much_changes(single, picture):
    kept = encoded(single, picture)
    changes = [
        np.abs(
            single(PROMPT, image=picture, strength=s, steps=10, guidance_scale=1.0, **LATENT).images
            - kept
        ).mean()
        for s in (0.1, 0.4, 1.0)
    ]
    assert changes == sorted(changes)


def test_several_images_for_one_prompt(single, picture):
    both = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    out = single(PROMPT, image=both, seed=[1, 1], output="latent").images
    alone = single(PROMPT, image=both[1], seed=1, output="latent").images
    assert near(out[1:], alone) < 1e-5


def test_size_is_that_of_the_image(single, picture):
    wide = picture.resize((24, 16))
    (out,) = single(PROMPT, image=wide).images
    assert out.size == (24, 16)
    (out,) = single(PROMPT, image=wide, height=20, width=16).images
    assert out.size == (16, 20)


def test_enlarged(single):
    out = hires_fix(single, PROMPT, scale=1.5, seed=3)
    assert out.images[0].size == (24, 24)
    assert (out.request.strength, out.request.height) == (0.7, 24)


def test_a_long_prompt_does_not_change_its_company(single):
    short, long = "a ring", "a small red circle above a large blue star " * 2
    together = single([short, long], seed=[5, 5], output="latent").images
    for row, prompt in enumerate((short, long)):
        alone = single(prompt, seed=5, output="latent").images[0]
        assert near(together[row], alone) < 1e-5
    assert near(together[1], together[0]) > 1e-3


def test_weights_of_words_change_the_image_and_weight_one_does_not(single):
    plain = single(PROMPT, **LATENT).images
    same = single("a small (red:1) circle", **LATENT).images
    heavy = single("a small (red:1.8) circle", **LATENT).images
    np.testing.assert_array_equal(same, plain)
    assert near(heavy, plain) > 1e-4


def test_clip_skip_changes_the_image(single):
    plain, skipped = (single(PROMPT, clip_skip=s, **LATENT).images for s in (0, 1))
    assert near(skipped, plain) > 1e-3
    with pytest.raises(InputError, match=r"^clip_skip: got 2, expected a number from 0 to 1"):
        single(PROMPT, clip_skip=2, **LATENT)


def test_loras_come_and_go_without_a_trace(one_device, tmp_path):
    one, two = (tiny.write_lora(one_device, tmp_path / f"{n}.safetensors", n) for n in (1, 2))
    stored = param_dict(one_device.unet)
    before = one_device(PROMPT, **LATENT).images
    compilations = one_device.stages.compilations
    assert one_device.load_lora(one, 0.5) == "1"
    alone = one_device(PROMPT, **LATENT).images
    one_device.load_lora(two, 0.25)
    both = one_device(PROMPT, **LATENT).images
    assert one_device.loras == {"1": 0.5, "2": 0.25}
    one_device.set_loras({"1": 0.5})
    np.testing.assert_array_equal(one_device(PROMPT, **LATENT).images, alone)
    one_device.unload_loras()
    assert one_device.loras == {}
    np.testing.assert_array_equal(one_device(PROMPT, **LATENT).images, before)
    for path, array in param_dict(one_device.unet).items():
        np.testing.assert_array_equal(array, stored[path])
    assert near(alone, before) > 1e-3
    assert near(both, alone) > 1e-3
    assert one_device.stages.compilations == compilations


def test_formats_that_need_the_weights_come_and_go(one_device, tmp_path):
    """Each changes the model's own weights, whatever other LoRAs do to them; 0 is nothing."""
    stored = param_dict(one_device.unet)
    kernel, bias = (np.asarray(stored[f"conv_out.{leaf}"]) for leaf in ("kernel", "bias"))
    ones = np.ones(torch_shape(kernel.shape, "conv_out.kernel"))
    doubled = {"lora_unet_conv_out.weight": np.ones(len(bias))}
    doubled["lora_unet_conv_out.on_input"] = np.zeros(())
    shifted = {"lora_unet_conv_out.diff": ones, "lora_unet_conv_out.diff_b": bias}
    for name, tensors in (("ia3", doubled), ("full", shifted)):
        tensors = {key: array.astype(np.float32) for key, array in tensors.items()}
        one_device.load_lora(originals.write_safetensors(tmp_path / f"{name}.safetensors", tensors))
    now = param_dict(one_device.unet)
    np.testing.assert_allclose(now["conv_out.kernel"], 2 * kernel + 1, rtol=1e-6)
    np.testing.assert_allclose(now["conv_out.bias"], 2 * bias, rtol=1e-6)
    one_device.set_loras({"ia3": 0.5, "full": 0.0})
    now = param_dict(one_device.unet)
    np.testing.assert_allclose(now["conv_out.kernel"], 1.5 * kernel, rtol=1e-6)
    np.testing.assert_array_equal(now["conv_out.bias"], bias)
    one_device.unload_loras()
    for path, array in param_dict(one_device.unet).items():
        np.testing.assert_array_equal(array, stored[path])


def test_a_broken_lora_leaves_the_model_as_it_was(single, tmp_path):
    before = single(PROMPT, **LATENT).images
    path = originals.write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="names that fit nothing"):
        single.load_lora(path)
    with pytest.raises(InputError, match=r"^lora: got 'y', expected one that is loaded"):
        single.set_loras({"y": 1.0})
    np.testing.assert_array_equal(single(PROMPT, **LATENT).images, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, r"^strength: got 0.5 without an image"),
        ({"mask": np.zeros((16, 16), bool)}, r"^mask: got a mask without an image"),
        (
            {"image": np.zeros((16, 17, 3), np.uint8), "width": 17},
            r"^width: got 17.*such as 16 or 18",
        ),
        ({"image": np.zeros((16, 16, 3), np.float32)}, r"^image: got an array of float32"),
        ({"image": np.zeros((16, 16), np.uint8)}, r"^image: got ndarray of shape"),
        ({"image": "cat.png"}, r"^image: got cat.png \(No such file"),
        ({"image": 3}, r"^image: got int"),
        (
            {"image": np.zeros((2, 16, 16, 3), np.uint8), "seed": [1, 2, 3]},
            r"^image: got 2 entries",
        ),
        (
            {"denoising_end": 0.0},
            r"^steps: got 4 with denoising_end 0.0, expected at least one step",
        ),
        ({"denoising_end": 1.5}, r"^denoising_end: got 1.5"),
        ({"original_size": (-1, 2)}, r"^original_size: got -1"),
    ],
)
def test_bad_input_is_one_sentence(single, options, message):
    with pytest.raises(InputError, match=message):
        single(PROMPT, **options)


def test_too_little_strength(single, picture):
    with pytest.raises(
        InputError, match=r"^steps: got 4 with strength 0.1, expected at least one step"
    ):
        single(PROMPT, image=picture, strength=0.1)


def test_masks_are_white_from_the_middle_on():
    grey = np.array([[0, 127], [128, 255]], np.uint8)
    np.testing.assert_array_equal(image_arrays.mask_array(grey, 2, 2)[0, ..., 0], [[0, 0], [1, 1]])
    np.testing.assert_array_equal(
        image_arrays.mask_array(grey / 255.0, 2, 2)[0, ..., 0], [[0, 0], [1, 1]]
    )


def test_images_of_any_mode_and_masks_of_any_size():
    """What is transparent is white, 16 bits of grey are the upper 8, masks are cut at one half."""
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[:, 8:] = (200, 30, 30, 255)
    got = (image_array(Image.fromarray(clear), 16, 16)[0] + 1) * 127.5
    np.testing.assert_allclose(got[0, [0, 15]], [[255, 255, 255], [200, 30, 30]])
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))
    got = (image_array(Image.fromarray(ramp), 48, 64)[0, 0, :, 0] + 1) * 127.5
    np.testing.assert_allclose(got, ramp[0] >> 8, atol=1e-4)
    np.testing.assert_array_equal(
        mask_array(Image.fromarray(ramp), 48, 64)[0, 0, :, 0], (ramp[0] >> 8) >= 128
    )
    edge = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 2, axis=0)).resize((6, 6), 0)
    resized = np.asarray(edge.resize((4, 4), Image.Resampling.LANCZOS)) >= 128
    np.testing.assert_array_equal(mask_array(edge, 4, 4)[0, ..., 0], resized)
    with pytest.raises(InputError, match=r"^mask: got an image with transparent parts"):
        mask_array(Image.fromarray(clear), 16, 16)


def test_a_scan_of_too_many_pixels_is_one_sentence(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "scan.png")
    with pytest.raises(InputError, match=r"^image: got .*scan.png \(more than 178,956,970 pixels"):
        by_request(CallImages(tmp_path / "scan.png"), None, 4)
