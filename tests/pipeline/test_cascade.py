"""Models that enlarge images, alone and one after the other."""

import dataclasses

import cascade_files
import numpy as np
import pytest
from PIL import Image
from tiny import first_devices

import jaxdiff
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.cascade import Cascade
from jaxdiff.samplers.base import EXTRA_NOISE_STEP, per_sample_keys, step_noise

PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    for name in ("first", "second", "upscaler"):
        write_pipeline(folder / name, getattr(cascade_files, name)(folder / f"of-{name}"))
    return folder


@pytest.fixture(scope="module")
def pipes(folders):
    names = ("first", "second", "upscaler")
    return [first_devices(jaxdiff.load(folders / name, dtype="float32"), 1) for name in names]


def test_a_folder_keeps_the_schedule_of_the_noise(folders, tmp_path):
    parts = read_pipeline(folders / "second")
    assert parts.noising_schedulers["image_noising_scheduler"] == cascade_files.COSINE
    write_pipeline(tmp_path / "again", parts)
    assert read_pipeline(tmp_path / "again").noising_schedulers == parts.noising_schedulers


def test_clipping_is_the_outermost_wrapper_of_every_rule_unless_a_request_has_one(pipes):
    first, second, upscaler = pipes
    assert first.defaults.clipping == "threshold:percentile=0.95,max_limit=1.5"
    assert second.defaults.clipping == "threshold:percentile=0.95,max_limit=1.0"
    assert upscaler.defaults.clipping is None  # latents
    resolved = first.resolve(PROMPT, guidance="apg+rescale")
    assert resolved.guidance == f"apg+rescale+{first.defaults.clipping}"
    assert first.resolve(PROMPT, guidance="cfg+clip-sample").guidance == "cfg+clip-sample"
    again = first.resolve(PROMPT, guidance=resolved.guidance)
    assert again.guidance == resolved.guidance


def test_a_cascade_is_its_models_one_after_the_other(pipes):
    first, second, upscaler = pipes
    own = {"steps": 2, "noise_level": 30}
    cascade = Cascade(first, second, upscaler)
    shared = {"negative_prompt": "a ring", "seed": [3, 5]}
    out = cascade(PROMPT, **shared, stage_options=[own], output="latent")
    images = first(PROMPT, **shared, output="latent").images
    assert images.shape == (2, 8, 8, 3)
    images = second(PROMPT, **shared, **own, image=images, output="latent").images
    assert images.shape == (2, 16, 16, 3)
    want = upscaler(PROMPT, **shared, image=images, output="latent").images
    assert want.shape == (2, 16, 16, 4)
    np.testing.assert_array_equal(out.images, want)
    assert out.timings["sample_s"] > 0
    assert cascade(PROMPT, seed=1).images[0].size == (32, 32)


def test_an_image_does_not_depend_on_its_batch(pipes):
    """The noise of the image to enlarge is of its seed, too."""
    _, second, _ = pipes
    low = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    options = {"output": "latent", "noise_level": 500}
    together = second(PROMPT, image=low, seed=4, **options).images
    alone = second(PROMPT, image=low[1], seed=5, **options).images
    np.testing.assert_allclose(together[1], alone[0], atol=5e-5)
    other = second(PROMPT, image=low[1], seed=5, output="latent", noise_level=0).images
    assert np.abs(other - alone).max() > 1e-3


def test_the_network_gets_the_image_with_noise_and_its_level(pipes):
    _, second, _ = pipes
    inputs = []
    conditioning = second.family.request_conditioning

    class Watched(type(second.family)):
        def request_conditioning(self, given):
            inputs.append(conditioning(given))
            return inputs[-1]

    low = np.zeros((8, 8, 3), np.uint8)
    watched = Watched(**vars(second.family))
    kept, second.stages._family = second.stages._family, watched
    try:
        second(PROMPT, image=low, seed=9, noise_level=250, steps=1)
    finally:
        second.stages._family = kept
    assert inputs[0]["class_labels"].tolist() == [[250, 250]]
    noise = step_noise(per_sample_keys([9]), EXTRA_NOISE_STEP, (16, 16, 3), np.dtype("float32"))
    schedule = second.family.extras[0].schedule
    want = schedule.alpha[250] * -1 + schedule.sigma[250] * np.asarray(noise)
    for stream in range(2):
        np.testing.assert_allclose(inputs[0]["channels"][:, stream], want, atol=1e-6)


def test_images_of_several_sizes_are_generated_in_batches_of_their_own(pipes):
    *_, upscaler = pipes
    lows = [Image.new("RGB", size, "red") for size in ((8, 8), (12, 8), (8, 8))]
    requests = [upscaler.resolve(PROMPT, image=low, seed=i)[0] for i, low in enumerate(lows)]
    sizes = [image.size for image in upscaler.generate(requests).images]
    assert sizes == [(16, 16), (24, 16), (16, 16)]


def test_an_original_image_is_changed_and_a_mask_kept_to(pipes):
    _, second, _ = pipes
    low, original = np.zeros((8, 8, 3), np.uint8), np.full((16, 16, 3), 200, np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[:, 8:] = True
    options = {"image": low, "original_image": original, "seed": 2}
    assert second.resolve(PROMPT, **options).strength == 0.8
    kept = second(PROMPT, **options, mask=mask, output="numpy").images[0]
    np.testing.assert_array_equal(kept[:, :8], original[:, :8])
    assert np.abs(kept[:, 8:].astype(int) - 200).max() > 10


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (0, {"noise_level": 3}, "noise_level: got 3, expected none for DeepFloyd IF: .* super-res"),
        (0, {"original_image": np.zeros((8, 8, 3), np.uint8)}, "original_image: got it for"),
        (1, {"noise_level": 1000}, "noise_level: got 1000, expected .* 999"),
        (2, {"noise_level": 351}, "noise_level: got 351, expected .* 350"),
        (1, {}, "image: got none, expected the image to enlarge"),
        (1, {"image": np.zeros((8, 8, 3)) * np.nan}, "image: got numbers that are not finite"),
        (1, {"image": np.full((8, 8, 3), 255.0)}, r"image: got floats up to 255, expected .*-1, 1"),
        (1, {"image": np.zeros((8, 8, 4), np.uint8)}, "image: got ndarray of shape"),
        (1, {"strength": 0.5}, "strength: got 0.5 without an original_image"),
        (0, {"guidance": "cfg-pp"}, "guidance: got wrapper threshold for cfg-pp"),
    ],
)
def test_bad_input_is_one_sentence(pipes, number, options, message):
    with pytest.raises(InputError, match=message):
        pipes[number](PROMPT, **options)


def test_stages_are_checked_before_anything_is_generated(pipes):
    first, second, _ = pipes
    with pytest.raises(InputError, match="then: got first, which is DeepFloyd IF, expected"):
        Cascade(second, first)
    cascade = Cascade(first, second)
    for own, message in (
        ([{"noise_level": -1}], "then: second: noise_level: got -1"),
        ([{"seed": 1}], "then: second: seed: got it for one stage"),
        ([{"image": np.zeros((8, 8, 3), np.uint8)}], "then: second: image: got it for one stage"),
        ([{"stepps": 1}], "then: second: stepps: got an unknown argument"),
        ([{}, {}], "stage_options: got 2, expected one for each of the 1 stages"),
    ):
        with pytest.raises(InputError, match=message):
            cascade(PROMPT, stage_options=own)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("second", {"noising_schedulers": {}}, "image_noising_scheduler: got none"),
        ("upscaler", {"noising_schedulers": {}}, "low_res_scheduler: got none"),
    ],
)
def test_a_model_without_the_schedule_of_the_noise_is_refused(
    folders, tmp_path, name, change, message
):
    write_pipeline(tmp_path / "m", dataclasses.replace(read_pipeline(folders / name), **change))
    with pytest.raises(InputError, match=message):
        jaxdiff.load(tmp_path / "m", dtype="float32")
