"""The one batcher: which requests share a batch, for a call and for a job of many requests."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jaxdiff.core.errors import InputError
from jaxdiff.pipeline.batches import by_batch_key, make_batches

PROMPT = "a small red circle"


def requests_of(pipe, *calls):
    return [request for options in calls for request in pipe.resolve(PROMPT, **options)]


def test_a_group_has_one_program(single):
    picture = Image.new("RGB", (16, 16), 99)
    requests = requests_of(
        single,
        {"seed": 1, "steps": 3, "guidance_scale": 2.0},
        {"height": 24},
        {"seed": 2, "steps": 5, "negative_prompt": "a star"},
        {"sampler": "euler"},
        {"image": picture, "strength": 0.5},
        {"image": np.zeros((8, 8, 4), np.float32)},
        {"image": picture, "strength": 0.9, "seed": 4},
        {"image": picture, "mask": Image.new("L", (16, 16))},
    )
    assert by_batch_key(requests) == [[0, 2], [1], [3], [4, 6], [5], [7]]


def test_a_batch_has_one_length_and_similar_steps(single):
    requests = requests_of(single, *({"steps": steps} for steps in (9, 2, 9, 4, 2)))
    lengths = [(1,), (1,), (2,), (1,), (1,)]
    assert list(make_batches(lengths, requests, 2)) == [[1, 4], [3, 0], [2]]


def test_requests_of_many_kinds_in_one_stream(single):
    """Each image is what a call of its own gives, whatever is generated with it."""
    calls = [
        {"seed": 1, "steps": 3},
        {"seed": 2, "height": 24, "steps": 2},
        {"seed": 3, "steps": 2, "sampler": "euler"},
        {"seed": 4, "steps": 2, "guidance_scale": 3.0},
        {"seed": 5, "steps": 3, "image": Image.new("RGB", (16, 16), 99), "strength": 0.7},
    ]
    requests = requests_of(single, *calls)
    streamed = {}
    for numbers, out in single.stream(requests, output="latent", batch_size=2):
        assert out.requests == tuple(requests[i] for i in numbers)
        assert len(numbers) <= 2
        streamed |= dict(zip(numbers, out.images, strict=True))
    assert sorted(streamed) == list(range(len(calls)))
    for number, options in enumerate(calls):
        (alone,) = single(PROMPT, output="latent", **options).images
        np.testing.assert_allclose(streamed[number], alone, atol=1e-5 * np.abs(alone).max())


def test_an_image_may_be_a_file(single, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = {"strength": 0.5, "seed": 3, "steps": 2, "output": "latent"}
    from_file = single(PROMPT, image=tmp_path / "a.png", **options).images
    np.testing.assert_array_equal(from_file, single(PROMPT, image=pixels, **options).images)


@pytest.mark.parametrize("noise", [True, False])
def test_noise_of_its_own_is_part_of_a_request(single, noise):
    rows = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    options = {"seed": [1, 2], "steps": 2} | ({"latents": rows} if noise else {})
    requests = single.resolve(PROMPT, **options)
    assert (requests[1].noise is None) != noise
    got = single.generate(requests, output="latent").images
    np.testing.assert_array_equal(got, single(PROMPT, output="latent", **options).images)


def test_intermediate_steps_of_requests_of_many_kinds(single):
    """Each request has the levels of its own sampler and steps."""
    requests = requests_of(single, {"steps": 3, "sampler": "lcm"}, {"steps": 3, "sampler": "euler"})
    both = single.generate(requests, output="latent", intermediate_steps=[1]).intermediates
    for row, request in enumerate(requests):
        alone = single.generate([request], output="latent", intermediate_steps=[1]).intermediates
        np.testing.assert_array_equal(both.sigma[:, row], alone.sigma)
        np.testing.assert_allclose(both.x[:, row], alone.x[:, 0], atol=1e-5 * np.abs(alone.x).max())
    assert both.sigma[0, 0] != both.sigma[0, 1]


def test_requests_of_several_sizes(single):
    requests = requests_of(single, {"steps": 1, "height": 24}, {"steps": 1})
    out = single.generate(requests)
    assert [image.size for image in out.images] == [(16, 24), (16, 16)]
    with pytest.raises(InputError, match="requests: got sizes 16x16, 24x16 with output 'latent'"):
        single.generate(requests, output="latent")
    with pytest.raises(InputError, match="with intermediate_steps, expected one size"):
        single.generate(requests, intermediate_steps=[0])


def test_settings_are_checked_before_any_image(single):
    with pytest.raises(InputError, match=r"^requests: got none, expected at least one"):
        single.generate([])
    requests = requests_of(single, {"steps": 1}, {"steps": 1, "height": 24})
    with pytest.raises(InputError, match=r"^vae_tile: got 3, expected a multiple of 2"):
        single.generate(requests, vae_tile=3)
    with pytest.raises(InputError, match=r"^output: got 'jpeg', expected one of pil, numpy"):
        single.generate(requests, output="jpeg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0.5}, "strength: got 0.5 without an image"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan"),
        ({"height": 17}, "height: got 17, expected a multiple of 2"),
        ({"denoising_end": 2.0}, "denoising_end: got 2.0"),
        ({"negative_scale": 2.0}, "negative_scale: got it with guidance cfg"),
        ({"prompt_2": "x"}, "prompt_2: got 'x'"),
        ({"extras": {"foo": 1}}, "option: got 'foo'"),
        ({"guidance": "cfg-pp", "sampler": "dpmpp-2m"}, "guidance: got cfg-pp with sampler"),
        ({"mask": np.zeros((16, 16), np.uint8)}, "mask: got a mask without an image"),
    ],
)
def test_requests_are_checked_whoever_made_them(single, changes, message):
    [request] = requests_of(single, {"steps": 1})
    with pytest.raises(InputError, match=f"^{message}"):
        single.generate([dataclasses.replace(request, **changes)])


def test_evaluations_are_those_of_the_images_own_guidance(single):
    choices = ({"guidance": "pag"}, {"guidance": "cfg"}, {"guidance_scale": 1.0})
    requests = requests_of(single, *({"steps": 3, "sampler": "euler", **each} for each in choices))
    alone = [single.nfe([request]) for request in requests]
    assert alone == [9, 6, 3]
    assert [single.nfe(requests, i) for i in range(2)] == alone[:2]
    with pytest.raises(InputError, match=r"^index: got 3"):
        single.nfe(requests, 3)


def test_a_stream_has_the_intermediate_steps(single):
    requests = requests_of(single, {"steps": 2}, {"steps": 2})
    for numbers, out in single.stream(requests, batch_size=1, intermediate_steps=[1]):
        assert out.intermediates.steps == (1,)
        assert len(out.intermediates.x[0]) == len(numbers)
